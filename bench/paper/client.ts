/** A client process: an open loop of requests to Redis, or to a guest that moves. */
import { answerCalls } from '../support/peer.js';
import { type KeyValueParameters, keyValueTarget } from './key-value-target.js';
import { OpenLoop, type OpenLoopFigures, type OpenLoopOptions, type Send } from './open-loop.js';
import { type RedisParameters, redisTarget } from './redis-target.js';

let send: Send | null = null;
let loop: OpenLoop | null = null;

answerCalls(
  {
    redis: async (parameters: RedisParameters) => {
      send = await redisTarget(parameters);
    },
    keyValue: (parameters: KeyValueParameters) => {
      send = keyValueTarget(parameters);
    },
    start: (options: OpenLoopOptions) => {
      if (send === null) throw new Error('started without a target');
      loop = new OpenLoop(send, options);
    },
    stop: (): Promise<OpenLoopFigures> => {
      if (loop === null) throw new Error('stopped before it was started');
      return loop.stop();
    },
  },
  () => {},
);
