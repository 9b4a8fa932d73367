"""A running batch step by step: as chunks from the host, or as one captured graph a batch size."""
