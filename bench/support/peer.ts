/** The side of a peer process: answers the calls of the trial that started it. */

export type Methods = Record<string, (parameters: never) => unknown>;

interface Call {
  id: number;
  method: string;
  parameters: never;
}

export function answerCalls(methods: Methods, close: () => void): void {
  const answer = async ({ id, method: name, parameters }: Call): Promise<void> => {
    try {
      const method = methods[name];
      if (method === undefined) throw new Error(`no method ${name}`);
      process.send?.({ id, value: (await method(parameters)) ?? null });
    } catch (error) {
      process.send?.({
        id,
        error: error instanceof Error ? (error.stack ?? error.message) : String(error),
      });
    }
  };
  process.on('message', (call: Call) => void answer(call));
  process.once('disconnect', () => {
    close();
    process.exit(0);
  });
}

/** Milliseconds by CLOCK_MONOTONIC: comparable between processes of one machine. */
export function monotonicMs(): number {
  return Number(process.hrtime.bigint()) / 1e6;
}
