"""Ray Train V2 jobs, and DPO as one. What they make goes into the store; nothing is left behind."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
import math
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import DEFAULT_WORKER_GROUP_START_TIMEOUT_S, WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kka_ray.cluster.checkpoints import Checkpoints
from kka_ray.cluster.placement import DIED, not_free
from kka_ray.cluster.workers import check_identity, runtime_env
from kka_ray.config.models import ClusterConfig
from kka_ray.errors import KkaError, NotFreeError, StageError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_CANCEL_SECONDS = 60.0


def run(
    name: str,
    function: Callable[[dict[str, Any]], None],
    arguments: Mapping[str, Any],
    workers: int,
    cluster: ClusterConfig,
    *,
    gpus: bool = True,
    ahead: Ahead | None = None,
) -> None:
    """Runs `function(arguments)` on `workers` processes of one Ray Train job and waits for its end.

    Each takes `cluster.train_cpus`, and `cluster.train_gpus` unless `gpus` is False: a function that computes on the
    CPU is not to hold a GPU.

    The function writes what it makes into the store. A worker that dies has the job started again, up to
    `cluster.max_restarts` times; an error of ours ends it at once and is passed on as it is. Each job has a name of its
    own: one used before would load the old job's state. Raises NotFreeError if the workers get no places within
    `cluster.start_timeout`, rounded up to the times that Ray Train waits at once (60 s). `ahead` is this job, if it was
    started before.
    """
    if ahead:
        return ahead.go(arguments)
    unique = f"{name}-{uuid.uuid4().hex[:8]}"
    each = cluster.train_gpus if gpus else 0.0
    # NCCL reduces what lies on GPUs alone.
    device = computes_on(cluster) if gpus else "cpu"
    backend = None if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(prefix="kka-train-") as storage:
        for restarts in itertools.count():
            trainer = _Trainer(
                function,
                torch_config=TorchConfig(backend=backend),
                train_loop_config={**arguments, "threads": cluster.train_threads},
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=each > 0,
                    resources_per_worker={"CPU": cluster.train_cpus} | ({"GPU": each} if each else {}),
                ),
                run_config=RunConfig(
                    name=unique,
                    storage_path=storage,
                    failure_config=FailureConfig(
                        max_failures=cluster.max_restarts, controller_failure_limit=_waits(cluster) - 1
                    ),
                    callbacks=[_EndsAtOnce()],
                    worker_runtime_env=runtime_env(cluster.train_runtime_env, device),
                ),
            )
            try:
                trainer.fit()
                return
            except (TrainingFailedError, *DIED) as error:
                if isinstance(_of_controller(error), WorkerGroupStartupTimeoutError):
                    raise not_free(f"the job {name}", workers, cluster.train_cpus, each, cluster) from error
                if not _unattended(error) or restarts >= cluster.max_restarts:
                    raise _reason(name, error) from error
                log.warning("the Ray Train job %s is started again: %s", name, str(error).splitlines()[0])


class _Trainer(TorchTrainer):
    """Ray Train's trainer, without its handling of Ctrl-C.

    It would end this process with status 0, as if the job were done. After the job it would stay in place, where it
    swallows Ctrl-C: the run that the job is part of could not be interrupted any more.
    """

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def fit(self) -> ray.train.Result:
        """Runs the job; Ctrl-C ends its workers and is raised."""
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self._controller is not None:
                with suppress(RayError):  # the controller ends itself by this call
                    ray.get(self._controller.abort.remote(), timeout=_CANCEL_SECONDS)
            raise
        finally:
            self._controller = None  # whoever keeps an error of the job would keep the controller's process with it


class _EndsAtOnce(UserCallback):
    """Ends a job by an error of ours: Ray Train would start it again for any error, which mends none of these."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        ours = _ours(worker_exceptions)
        if ours:
            raise ours  # unlike a worker's own error, one of a callback is not tried again


class Ahead:
    """A job whose workers start and import while it is still being worked out what they are to do.

    That takes longer than many a job itself. Every job that was made must be told: `go` or `cancel`.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[dict[str, Any]], None],
        workers: int,
        cluster: ClusterConfig,
        *,
        imports: Sequence[str] = (),
        gpus: bool = True,
    ) -> None:
        """Arguments are those of `run`; `imports` are modules that the function only imports as it runs."""
        # On this node: without the driver's there is no job.
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._gate = ray.remote(num_cpus=0, scheduling_strategy=node)(_Gate).remote()
        self._error: BaseException | None = None
        self._run = lambda told: run(name, function, told, workers, cluster, gpus=gpus)
        arguments = {"gate": self._gate, "function": function, "imports": list(imports)}

        def work() -> None:
            try:
                run(name, _behind_the_gate, arguments, workers, cluster, gpus=gpus)
            except BaseException as error:  # told to whoever waits for the job
                self._error = error

        self._thread = threading.Thread(target=work, name=f"kka-{name}", daemon=True)
        self._thread.start()

    def go(self, arguments: Mapping[str, Any]) -> None:
        """Runs the function with these arguments and waits for its end; see `run`.

        Where it got no places, it is started again: part of its wait, or all, was while others had them.
        """
        try:
            self._open(dict(arguments))
        except DIED:  # nobody can tell that job anything any more
            self._thread.join(_CANCEL_SECONDS)
            return self._run(arguments)
        self._thread.join()
        if isinstance(self._error, NotFreeError):
            return self._run(arguments)
        if self._error:
            raise self._error

    def cancel(self) -> None:
        """Ends the workers: there is nothing to do."""
        with suppress(*DIED):  # the cluster may be gone
            self._open(None)
        self._thread.join(_CANCEL_SECONDS)

    def _open(self, arguments: dict[str, Any] | None) -> None:
        ray.get(self._gate.open.remote(arguments))


class _Gate:
    """Where the workers of a job wait to be told what to do."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._arguments: dict[str, Any] | None = None

    async def open(self, arguments: dict[str, Any] | None) -> None:
        self._arguments = arguments
        self._opened.set()

    async def wait(self) -> dict[str, Any] | None:
        await self._opened.wait()
        return self._arguments


def _behind_the_gate(arguments: dict[str, Any]) -> None:
    for module in arguments["imports"]:
        importlib.import_module(module)
    told = ray.get(arguments["gate"].wait.remote())
    if told is not None:
        arguments["function"]({**told, "threads": arguments["threads"]})


def _waits(cluster: ClusterConfig) -> int:
    """How often Ray Train, which would wait for ever, may wait for the places of its workers."""
    at_once = float(os.environ.get(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, DEFAULT_WORKER_GROUP_START_TIMEOUT_S))
    return math.ceil(cluster.start_timeout / at_once)


def _of_controller(error: Exception) -> Exception:
    """What failed in the job's controller, else the error itself."""
    return error.controller_failure if isinstance(error, ControllerError) else error


def _unattended(error: Exception) -> bool:
    """Whether a worker died while Ray Train was not looking, or its controller did: it starts neither again itself."""
    return isinstance(_of_controller(error), DIED)


def _ours(failures: Mapping[int, Exception]) -> KkaError | None:
    """An error of ours among those of the workers."""
    causes = (getattr(failure, "cause", failure) for failure in failures.values())
    return next((cause for cause in causes if isinstance(cause, KkaError)), None)


def _reason(name: str, error: Exception) -> KkaError:
    of_controller = _of_controller(error)
    if isinstance(of_controller, KkaError):
        return of_controller
    return StageError(f"the Ray Train job {name} failed: {error}")


def rank() -> tuple[int, int]:
    """This worker's number and the number of workers, inside a job."""
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


def device(cluster: ClusterConfig) -> torch.device:
    """What this worker computes on, inside a job."""
    import torch
    from ray.train.torch import get_device

    return get_device() if computes_on(cluster) == "cuda" else torch.device("cpu")


def computes_on(cluster: ClusterConfig) -> str:
    """`cuda` where the workers of a job compute on GPUs, else `cpu`."""
    return "cuda" if cluster.train_gpus and cluster.device == "auto" else "cpu"


def dpo_worker(arguments: dict[str, Any]) -> None:
    """One worker of a DPO job: `pairs` (key in stage `pairs`) train an adapter, committed by the first worker.

    A job that is started again goes on from its last checkpoint in the store.
    """
    import torch

    from kka_ray import assets
    from kka_ray.preference.dpo import VERSION, train_dpo
    from kka_ray.records import PreferencePair, from_table
    from kka_ray.store import Attempt, Store, stage_key

    check_identity("the sampler's model", assets.resolve(arguments["model"]).identity, arguments["inputs"]["model"])
    torch.set_num_threads(arguments["threads"])
    number, workers = rank()
    cpu = device(arguments["cluster"]).type == "cpu"
    if cpu:
        # Ray names the GPU that a worker holds here, and Accelerate takes that before it is told to use none.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    store = Store(arguments["store"])
    pairs = store.reported("pairs", arguments["pairs"])
    previous = store.reported("dpo", arguments["previous"]) if arguments["previous"] else None
    key = stage_key("dpo", VERSION, arguments["inputs"])
    attempt, checkpoints = Attempt(store, "dpo", key), Checkpoints(store, "dpo", key)
    with tempfile.TemporaryDirectory(prefix="kka-dpo-") as temporary:
        work = Path(temporary)
        result = train_dpo(
            from_table(PreferencePair, pairs.table()),
            arguments["model"],
            previous.local / "adapter" if previous else None,
            arguments["config"],
            arguments["seed"],
            work / "result" / "adapter",
            work / "trl",
            workers=workers,
            cpu=cpu,
            trust_remote_code=arguments["trust_remote_code"],
            checkpoints=checkpoints,
        )
        if number == 0:
            attempt.folder(work / "result")
            attempt.json(result.to_json(), "result")
            store.commit(attempt, arguments["inputs"])
            checkpoints.clear()
