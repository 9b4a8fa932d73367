"""The OpenAI-compatible endpoints: request bodies in, completions and streams of chunks out."""
