"""A model file on a local page, and for scripts over HTTP."""
