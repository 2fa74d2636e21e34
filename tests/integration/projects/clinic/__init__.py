"""An ordinary Django project with Celery, as the documentation of both has it."""
