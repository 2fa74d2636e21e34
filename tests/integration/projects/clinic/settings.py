"""The project's settings; its database pretends to have a pool, which Django's own has only for PostgreSQL."""

import json
import os
from pathlib import Path

SECRET_KEY = "for tests"
USE_TZ = True
INSTALLED_APPS = ["clinic"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
DATABASES = {
    "default": {
        "ENGINE": "clinic.pooled",
        "NAME": Path(os.environ["SHOP_NOTES"]).parent / "db.sqlite3",
        "OPTIONS": {"pool": True},
    }
}
CELERY_BROKER_URL = os.environ["SHOP_BROKER"]
CELERY_RESULT_BACKEND = os.environ["SHOP_RESULTS"]
for _name, _value in json.loads(os.environ.get("SHOP_CONFIG") or "{}").items():
    globals()[f"CELERY_{_name.upper()}"] = _value
