"""The two files that are copied verbatim into every RM folder; they import nothing of UPS-RM."""
