"""Against peers and plain decoding: tokens per second, memory, and whether tokens are the same."""
