"""A trainer: a long-lived process that imports torch once and does what its supervisor asks, one thing at a time.

Requests come in as JSON lines on standard input and events go out as JSON lines on the descriptor that the command line
names; whatever is printed goes to the log. It talks to no database and no server. It ends when its input closes, so it
never outlives its supervisor.
"""

import hashlib
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_pipeline.dataset import DatasetError, load_npz, sha256_in
from hpo import crash
from hpo.errors import disk_is_full
from hpo.text import for_csv, utf8

Emit = Callable[..., None]

CHECKPOINT_SHARE = 0.01  # of the time may go into checkpoints
PROBE_BATCHES = 4  # timed for an estimate
ALIVE_INTERVAL = 10.0  # seconds between two signs of life where an epoch, say, takes minutes


def main() -> None:
    emit, requests, stop = connect()

    import torch

    torch.use_deterministic_algorithms(True)
    emit("ready")
    actions: dict[str, Callable[..., None]] = {"train": train, "score": score, "probe": probe}
    while True:
        request = requests.get()
        torch.set_num_threads(1)  # what a trial asks for is its own affair
        try:
            actions[request.pop("do")](emit, stop, **request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            if disk_is_full(error):
                emit("full", reason=f"no room on the disk ({error})")
            elif isinstance(error, DatasetError):
                emit("spoiled", reason=str(error))
            else:
                emit("failed", reason=f"{type(error).__name__}: {error}")
        stop.clear()


def connect() -> tuple[Emit, "queue.Queue[dict[str, Any]]", threading.Event]:
    """The pipes to our supervisor: what sends an event, the requests, and whether to stop the present one."""
    os.umask(0o077)  # what we write lies in HPO_HOME
    # Ctrl-C and the signals of a batch system reach the whole process group; only the supervisor acts on them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    events = os.fdopen(int(sys.argv[1]), "w", buffering=1, encoding="utf-8")
    os.set_inheritable(events.fileno(), False)  # the supervisor takes its end for ours

    def emit(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, **fields}) + "\n")

    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(requests, stop), daemon=True).start()
    return emit, requests, stop


def _listen(requests: "queue.Queue[dict[str, Any]]", stop: threading.Event) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "stop":
            stop.set()
        else:
            requests.put(request)
    os._exit(0)


def train(
    emit: Emit,
    stop: threading.Event,
    *,
    spec: dict[str, Any],
    data: str,
    checkpoint: str | None,
    start: str | None,
    folder: str,
    cache: str,
    device: str,
    checkpoint_interval: float,
) -> None:
    """Train one trial and leave its model in `folder`/model, and beside it what that predicts of the validation split.
    `start` is the folder of the model it begins with.

    Events: started, alive, epoch, checkpoint; then one of trained, returned (stopped; a checkpoint came before if there
    is an epoch to keep), diverged.
    """
    import torch

    from hpo.tracking.packaging import package
    from models import metrics, networks, specs
    from models.checkpoint import load_state, save_state
    from models.regressor import predict
    from models.training import Diverged, Interrupted, Training

    dataset, parts = _data(data)
    alive = _signs_of_life(emit)
    model, settings = specs.from_dict(spec["model"]), specs.training_from_dict(spec["training"])
    torch.set_num_threads(settings.threads)
    work = Path(folder)
    work.mkdir(parents=True, exist_ok=True)
    begin = partial(
        Training,
        model,
        settings,
        train=(dataset.images[parts.train], dataset.targets[parts.train]),
        validation=(dataset.images[parts.validation], dataset.targets[parts.validation]),
        seed=spec["seed"],
        initial=_initial(spec, start),
        cache=Path(cache),
        alive=alive,
        symmetries=dataset.symmetries,
        phases=spec.get("phases"),
        target_names=dataset.target_names,
        device=_device(device),
    )
    try:
        training = begin(state=load_state(Path(checkpoint)) if checkpoint else None)
    except specs.SpecError as error:
        if checkpoint is None:
            raise
        print(f"starting again from epoch 0: {error}")  # a checkpoint of another version, say
        training = begin()
    del begin  # and with it the tensors to begin with
    emit("started", epoch=training.epoch, parameters=networks.parameter_count(training.network))

    kept = training.epoch

    def keep() -> float:
        """Write a checkpoint; return the seconds it took."""
        nonlocal kept
        begin = time.monotonic()
        path = work / f"checkpoint-{training.epoch:06d}.safetensors"
        save_state(training.state(), path)
        kept = training.epoch
        emit("checkpoint", path=str(path), epoch=kept, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        return time.monotonic() - begin

    def asked_to_stop() -> bool:
        if kept:
            crash.at("batch")
        alive()
        return stop.is_set()

    pause, last = checkpoint_interval, time.monotonic()
    try:
        for epoch in training.epochs(asked_to_stop):
            emit("epoch", number=epoch.number, at=time.time_ns() // 1_000_000, metrics=epoch.metrics)
            if time.monotonic() - last >= pause and epoch.number < settings.epochs:
                pause = max(checkpoint_interval, keep() / CHECKPOINT_SHARE)
                last = time.monotonic()
    except Interrupted:
        if training.epoch > kept:
            keep()
        emit("returned", epoch=training.epoch)
        return
    except Diverged as error:
        emit("diverged", epoch=error.epoch)
        return

    variance = training.scaling.variance
    images, targets = dataset.images[parts.validation], dataset.targets[parts.validation]
    best, final = training.best_regressor(), training.last_regressor()
    predicted = predict(best, images, alive=alive)
    found = metrics.scores(predicted, targets, train_variance=variance).to_dict()
    last_found = metrics.scores(predict(final, images, alive=alive), targets, train_variance=variance).to_dict()
    predictions = work / "validation.csv"
    for_csv(_table(dataset, parts.validation, predicted)).to_csv(predictions, index=False)
    crash.at("packaging")
    target = work / "model"
    shutil.rmtree(target, ignore_errors=True)
    package(
        target,
        best,
        spec=spec["model"],
        image_shape=tuple(dataset.images.shape[1:]),
        target_names=dataset.target_names,
        unit=dataset.unit,
        example_images=images[:2],
        extra={
            "trial": spec,
            "validation": found,
            "best_epoch": training.best_epoch,
            "data": {"name": dataset.metadata["name"], "digest": dataset.digest},
        },
    )
    emit(
        "trained",
        folder=str(target),
        predictions=str(predictions),
        epochs=training.epoch,
        best_epoch=training.best_epoch,
        best_val_nmse=training.best_nmse,
        best_val_mse=training.best_mse,
        last_val_nmse=training.last_nmse,
        last_val_mse=training.last_mse,
        validation=found,
        last_validation=last_found,
        **_device_name(training.device),
    )


def _signs_of_life(emit: Emit) -> Callable[[], None]:
    """To be called often: now and then it says that work goes on, which a trainer that hangs does not."""
    shown = time.monotonic()

    def alive() -> None:
        nonlocal shown
        if time.monotonic() - shown > ALIVE_INTERVAL:
            emit("alive")
            shown = time.monotonic()

    return alive


def _initial(spec: dict[str, Any], start: str | None) -> dict[str, Any] | None:
    """The tensors of the network a trial begins with; None when it begins at random."""
    from models import bundle, weights
    from models.specs import SpecError

    if start is not None:
        return dict(bundle.load(Path(start))[0].network.state_dict())
    if (file := spec.get("weights")) is None:
        return None
    path, sha256 = weights.find(file["name"])
    if sha256 != file["sha256"]:
        raise SpecError(f"{path}: expected SHA-256 {file['sha256']}, as the study was planned, found {sha256}.")
    return weights.load(path, spec["model"]["backbone"])


def _device(wish: str) -> str:
    """`auto` is a GPU if there is one."""
    import torch

    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda":
        # What is trained on a GPU must score the same on the CPU that checks it: no shortened numbers.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return wish


def _device_name(device: Any) -> dict[str, str]:
    import torch

    return {"device": f"cuda: {torch.cuda.get_device_name(device)}"} if device.type == "cuda" else {}


def score(emit: Emit, stop: threading.Event, *, folder: str, data: str, predictions: str) -> None:
    """Load a downloaded model, predict the validation and the test split, and write all predictions as CSV.

    Event: scored {validation, test, predictors: {name: {validation, test}}}, each as models.metrics.Scores.to_dict.
    """
    import pandas

    from models import bundle, metrics
    from models.regressor import predict

    crash.at("scoring")
    alive = _signs_of_life(emit)
    dataset, parts = _data(data)
    regressor, spec = bundle.load(Path(folder))
    bundle.check_shape(spec, dataset.images.shape[1:], where="the data set")
    variance = dataset.targets[parts.train].var(axis=0)
    learned = (dataset.images[parts.train], dataset.targets[parts.train])
    predictors = {name: fit(*learned) for name, fit in metrics.PREDICTORS.items()}
    predictors["model"] = lambda images: predict(regressor, images, alive=alive)
    found: dict[str, dict[str, Any]] = {}
    tables = []
    for part, indices in (("validation", parts.validation), ("test", parts.test)):
        truth = dataset.targets[indices]
        for name, predictor in predictors.items():
            predicted = predictor(dataset.images[indices])
            found.setdefault(name, {})[part] = metrics.scores(predicted, truth, train_variance=variance).to_dict()
            if name == "model":
                table = _table(dataset, indices, predicted)
                table.insert(1, "split", part)
                tables.append(table)
    for_csv(pandas.concat(tables)).to_csv(predictions, index=False)
    emit("scored", **found.pop("model"), predictors=found)


def _table(dataset: Any, indices: Any, predicted: Any) -> Any:
    """The frame of predictions: `image`, then each target as `C11 true`, then each as `C11 predicted`, in the label's
    unit."""
    import pandas

    names = dataset.target_names
    table = pandas.DataFrame(dataset.targets[indices], columns=[f"{name} true" for name in names])
    table[[f"{name} predicted" for name in names]] = predicted
    table.insert(0, "image", [utf8(dataset.names[index]) for index in indices])
    return table


def probe(emit: Emit, stop: threading.Event, *, specs: list[dict[str, Any]], data: str, device: str) -> None:
    """Time a few batches of each trial; weights that are not on this machine are replaced by random ones, as costly.

    Event for each: probed {index, parameters, seconds of one epoch, once (seconds before the first: what a frozen
    backbone sees, say), memory (GB this process has needed so far; not a GPU's), device (the GPU's name, else "")}.
    """
    import resource

    import torch

    from models import networks
    from models import specs as model_specs
    from models.training import Training

    dataset, parts = _data(data)
    device = _device(device)
    torch.zeros(1, device=device)  # what a GPU takes to begin is no network's
    for index, spec in enumerate(specs):
        settings = model_specs.training_from_dict({**spec["training"], "epochs": 2})
        torch.set_num_threads(settings.threads)
        count = min(len(parts.train), PROBE_BATCHES * settings.batch_size)
        share = count / len(parts.train)
        some, others = parts.train[:count], parts.validation[: max(1, round(share * len(parts.validation)))]
        initial = _initial(spec, None) if spec.get("weights", {}).get("sha256") else None
        begin = time.monotonic()
        training = Training(
            model_specs.from_dict(spec["model"]),
            settings,
            train=(dataset.images[some], dataset.targets[some]),
            validation=(dataset.images[others], dataset.targets[others]),
            seed=spec["seed"],
            initial=initial,
            symmetries=dataset.symmetries,
            phases=spec.get("phases"),
            target_names=dataset.target_names,
            device=device,
        )
        once = (time.monotonic() - begin) / share
        seconds = [epoch.metrics["seconds"] for epoch in training.epochs()][-1]  # the first one warms up
        parameters = networks.parameter_count(training.network)
        training.state()  # what a checkpoint needs counts, too
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        gpu = torch.cuda.get_device_name(training.device) if training.device.type == "cuda" else ""
        emit("probed", index=index, parameters=parameters, seconds=seconds / share, once=once, memory=peak, device=gpu)
    emit("finished")


@lru_cache(maxsize=2)
def _data(path: str) -> tuple[Any, Any]:
    from data_pipeline.split import split

    dataset = load_npz(Path(path), sha256=sha256_in(Path(path)))
    return dataset, split(len(dataset.images))


if __name__ == "__main__":
    main()
