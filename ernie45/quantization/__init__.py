"""Weight-only quantisation: 8-bit and 4-bit weights under the published quantised -Paddle names."""
