/** Sets of connections whose tokens are computed in advance; those of later ones follow (wire/later_tokens.h). */
export const maxEpochs = 256;
