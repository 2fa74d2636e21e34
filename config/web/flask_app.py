from flask import Flask, request
from tasks import average

web = Flask(__name__)


@web.post("/average")
def enqueue():
    return {"task_id": average.delay(request.get_json()).id}, 202


@web.get("/result/<task_id>")
def result(task_id):
    task = average.AsyncResult(task_id)
    state = task.state
    if state == "FAILURE":
        return {"state": state, "error": str(task.result)}
    return {"state": state, "result": task.result if state == "SUCCESS" else None}
