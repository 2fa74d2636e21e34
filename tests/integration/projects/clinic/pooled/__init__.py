"""Django's SQLite with a pool in name: it notes each time that it is asked to close."""
