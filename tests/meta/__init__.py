"""The project itself: layering, docs, command line, scripts."""
