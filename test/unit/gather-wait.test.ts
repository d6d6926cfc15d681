import { describe, expect, it } from 'vitest';
import { MemferryError } from '../../src/errors.js';
import type { SourceMessage } from '../../src/protocol/messages.js';
import { GatherWait, stillGathering, worthWaitingFor } from '../../src/source/gather-wait.js';

function questionOf(message: SourceMessage): number {
  if (message.type !== 'ask-missing') throw new Error(`a message '${message.type}'`);
  return message.question;
}

/** A destination that answers with these, one after the other, and then with the last one. */
function asking(answers: number[], signal = new AbortController().signal) {
  let asked = 0;
  const wait: GatherWait = new GatherWait((message) => {
    const question = questionOf(message);
    const answer = answers[Math.min(asked++, answers.length - 1)];
    if (answer !== undefined) queueMicrotask(() => wait.onMissing(answer, question));
  }, signal);
  return { wait, asked: () => asked };
}

describe('waiting for what a destination gathers', () => {
  it('is not for a few references', () => {
    expect(worthWaitingFor(0, 0)).toBe(false);
    expect(worthWaitingFor(0, 1000)).toBe(false);
    expect(worthWaitingFor(124, 1000)).toBe(false);
    expect(worthWaitingFor(125, 1000)).toBe(true);
    expect(worthWaitingFor(1, 0)).toBe(true);
  });

  it('ends when all is there, or when no more of it comes', () => {
    const progress = { missingPages: 5, suspectPages: 0, leastPages: 10, sinceProgressMs: 10_000 };
    expect(stillGathering(progress)).toBe(true);
    expect(stillGathering({ ...progress, missingPages: 0 })).toBe(false);
    expect(stillGathering({ ...progress, suspectPages: 5 })).toBe(false);
    expect(stillGathering({ ...progress, suspectPages: 4 })).toBe(true);
    expect(stillGathering({ ...progress, missingPages: 10 })).toBe(false);
    expect(stillGathering({ ...progress, missingPages: 12, sinceProgressMs: 100 })).toBe(true);
  });

  it('asks until nothing is missing', async () => {
    const { wait, asked } = asking([300, 200, 0]);
    await wait.untilGathered(0, () => false, 60_000);
    expect(asked()).toBe(3);
    wait.onMissing(7, 3); // an answer that nobody waits for
  });

  it('takes no answer to an earlier question', async () => {
    let asked = 0;
    const wait: GatherWait = new GatherWait((message) => {
      const question = questionOf(message);
      asked++;
      queueMicrotask(() => {
        wait.onMissing(0, question - 1);
        wait.onMissing(asked < 5 ? 100 - asked : 0, question);
      });
    }, new AbortController().signal);
    await wait.untilGathered(0, () => false, 60_000);
    expect(asked).toBe(5);
  });

  it('waits no longer for pages that are not to be had', async () => {
    const { wait, asked } = asking([300, 40]);
    await wait.untilGathered(0, () => false, 60_000);
    expect(asked()).toBeGreaterThan(3);
  });

  it('waits no longer than its bound, nor when somebody wants to go on', async () => {
    let left = 1e6;
    const wait: GatherWait = new GatherWait(
      (message) => queueMicrotask(() => wait.onMissing(left--, questionOf(message))),
      new AbortController().signal,
    );
    await wait.untilGathered(0, () => false, 100);
    expect(left).toBeLessThan(1e6);
    await wait.untilGathered(0, () => left < 1e6 - 10, 60_000);
    const before = left;
    await wait.untilGathered(0, () => true, 60_000);
    expect(left).toBe(before);
  });

  it('ends with the migration, and with the connection', async () => {
    const abort = new AbortController();
    const { wait } = asking([], abort.signal);
    const cancelled = wait.untilGathered(0, () => false, 60_000);
    abort.abort(new MemferryError('CANCELLED', 'no more'));
    await expect(cancelled).rejects.toMatchObject({ code: 'CANCELLED' });

    const { wait: cut } = asking([]);
    const lost = cut.untilGathered(0, () => false, 60_000);
    cut.fail(new MemferryError('CHANNEL_LOST', 'gone'));
    await expect(lost).rejects.toMatchObject({ code: 'CHANNEL_LOST' });
  });
});
