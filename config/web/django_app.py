import json

from django.http import JsonResponse
from django.urls import path
from tasks import average


def enqueue(request):
    return JsonResponse({"task_id": average.delay(json.loads(request.body)).id}, status=202)


def result(request, task_id):
    task = average.AsyncResult(task_id)
    state = task.state
    if state == "FAILURE":
        return JsonResponse({"state": state, "error": str(task.result)})
    return JsonResponse({"state": state, "result": task.result if state == "SUCCESS" else None})


urlpatterns = [path("average", enqueue), path("result/<task_id>", result)]
