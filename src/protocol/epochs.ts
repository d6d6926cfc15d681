/** Redials after a cut before a migration gives up, whatever the time: one set of single-use tokens each. */
export const maxEpochs = 256;
