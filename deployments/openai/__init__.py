"""OpenAI's HTTP interface over any engine that speaks in tokens."""
