"""One module per DVC stage: files in, files out; the only code that knows paths."""
