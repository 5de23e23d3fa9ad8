"""The `soundwave` command and what it runs for users: transcribe, ask, quickstart."""
