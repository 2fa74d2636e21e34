from fastapi import FastAPI
from tasks import average

web = FastAPI()


@web.post("/average", status_code=202)
def enqueue(numbers: list[float], seconds: float = 0):
    return {"task_id": average.delay(numbers, seconds).id}


@web.get("/result/{task_id}")
def result(task_id: str):
    task = average.AsyncResult(task_id)
    state = task.state
    if state == "FAILURE":
        return {"state": state, "error": str(task.result)}
    return {"state": state, "result": task.result if state == "SUCCESS" else None}
