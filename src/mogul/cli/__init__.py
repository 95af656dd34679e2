"""The command line: one thin file a verb, found by a static table. Importing it costs nothing."""
