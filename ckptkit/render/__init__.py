"""Turn results into text, Markdown and JSON documents. Nothing here decides anything or prints."""
