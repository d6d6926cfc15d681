/** As much of cli-progress, which brings no types of its own, as is used here. */
declare module 'cli-progress' {
  interface BarOptions {
    format?: string;
    barsize?: number;
    fps?: number;
    hideCursor?: boolean;
    clearOnComplete?: boolean;
    stream?: NodeJS.WritableStream;
  }
  export class SingleBar {
    constructor(options: BarOptions);
    start(total: number, startValue: number, payload?: object): void;
    setTotal(total: number): void;
    update(value: number, payload?: object): void;
    update(payload: object): void;
    stop(): void;
  }
}
