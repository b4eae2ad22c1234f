"""The HTTP door: OpenAI's video API over the folders of runs."""
