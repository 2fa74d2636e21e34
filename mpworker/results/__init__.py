"""Memory: one result is one JSON line. Standard library only; never imports Celery, opens nothing on import."""
