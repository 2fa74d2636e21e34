"""The engine: a supervised process pool. Standard library only; knows nothing of Celery, Redis or results."""
