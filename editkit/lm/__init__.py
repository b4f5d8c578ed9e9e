"""The only floor that knows transformers: loading, encoding, tracing, generating."""
