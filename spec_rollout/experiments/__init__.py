"""A policy trained several ways: the demo, the drift of heads, a draft made ahead."""
