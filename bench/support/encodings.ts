/** lz4, zstd and deltas, as in src/protocol/encodings.ts; what is used is the sender's to say. */
export const allEncodings = 32 + 64 + 128;
/** What servers take. */
export const compressions = 32 + 64;
