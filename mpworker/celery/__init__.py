"""The room that speaks Celery: the only one that imports celery and kombu. Importing it starts nothing."""
