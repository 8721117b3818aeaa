"""Measures a server over HTTP, this project's or any other with OpenAI's API, and a fake engine to
measure the serve plane alone."""
