"""An ordinary Celery project, as anyone has one: an app, tasks, signal receivers."""
