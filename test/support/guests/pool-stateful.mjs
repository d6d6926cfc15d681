/** The program of pool.mjs, whose guest does not say that its threads keep nothing. */
import { defineGuest } from 'memferry/worker';
import { pool } from './pool.mjs';

export default defineGuest({ ...pool, statelessThreads: false });
