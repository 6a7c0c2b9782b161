"""What becomes of a request before it is carried out: checked, noted in the ledger, handed on."""

from __future__ import annotations

import math
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError, show
from lobra.service.backlog import LOSS_KINDS
from lobra.service.bodies import (
    MOST_NUMBER,
    Body,
    CreateModel,
    CreateSampler,
    LoadWeights,
    OfModel,
    Sample,
)
from lobra.service.changes import sampler_name
from lobra.service.coordinator import Coordinator
from lobra.service.deployment import PATH_PREFIX, Deployment
from lobra.service.ledger import Ledger
from lobra.service.quotas import Quotas
from lobra.service.refusal import Refusal
from lobra.service.sampler import SampleRequest
from lobra.service.sampling import Sampling
from lobra.service.tables import (
    SAMPLE,
    CheckpointRow,
    ModelRow,
    RequestRow,
    SamplerRow,
    models,
    requests,
    samplers,
    sessions,
)
from lobra.service.tenants import Tenant
from lobra.tasks.target_modules import HEAD, TARGET_MODULES

NOTE_SIGNS_S = 3600.0  # between two signs of life of a session that the ledger has
SESSION_LIFE_S = 60.0  # without a sign, which clients give every 10 s; then it makes room
ATTENTION, MLP = TARGET_MODULES[:4], TARGET_MODULES[4:]
CHECKPOINT_PATH = re.compile(
    rf"{PATH_PREFIX}[^/]+/(weights|sampler_weights)/[A-Za-z0-9][A-Za-z0-9._-]*"
)


class Intake:
    """Takes requests in; its methods may be called from any thread."""

    def __init__(
        self,
        deployment: Deployment,
        ledger: Ledger,
        coordinator: Coordinator,
        sampling: Sampling,
    ) -> None:
        self.deployment = deployment
        self.ledger = ledger
        self.coordinator = coordinator
        self.sampling = sampling
        for row in ledger.unfinished_samples():
            assert row.body is not None, "a request's body is kept until it is finished"
            self._submit_sample(row, Sample.model_validate_json(row.body))
        self._lock = threading.RLock()
        self._started_at = time.monotonic()
        self._seen_at: dict[str, float] = {}  # of a session since the start (monotonic)
        self._noted_at: dict[str, float] = {}  # when a session's sign was (monotonic)
        self._quotas = Quotas(ledger)

    # -- whose it is ----------------------------------------------------------------------------

    def new_session(self, tenant: Tenant) -> str:
        """Return the name of a new session of a tenant."""
        name, now = secrets.token_hex(16), time.monotonic()
        self._quotas.check_sessions(tenant)
        with self._lock:
            seen, noted = self._seen_at.items(), self._noted_at.items()
            self._seen_at = {one: at for one, at in seen if now - at <= SESSION_LIFE_S}
            self._noted_at = {one: at for one, at in noted if now - at <= NOTE_SIGNS_S}
            self._seen_at[name] = self._noted_at[name] = now
        self.ledger.insert(sessions, {"id": name, "tenant": tenant.name, "created_at": time.time()})
        return name

    def heartbeat(self, tenant: Tenant, session_id: str) -> None:
        """Note that a session goes on."""
        self.check_session(tenant, session_id)
        self._note_sign(session_id)

    def _note_sign(self, session_id: str) -> None:
        """Note a sign of life of a session; in the ledger not each one."""
        now = time.monotonic()
        with self._lock:
            self._seen_at[session_id] = now
            if now - self._noted_at.get(session_id, -math.inf) > NOTE_SIGNS_S:
                self.ledger.note_sign(session_id)
                self._noted_at[session_id] = now

    def finish_session(self, tenant: Tenant, session_id: str) -> None:
        """Close the models of a session that is over; what was saved of them stays."""
        self.check_session(tenant, session_id)
        for model in self.ledger.models_of(tenant.name):
            if model.session_id == session_id:
                self._unload(tenant, model)

    def _unload(self, tenant: Tenant, model: ModelRow) -> None:
        """Have a model closed that nobody uses any more, also where numbers are missing."""
        with self._lock:
            seq_id = self.ledger.first_missing(model.id)
            body = OfModel(model_id=model.id, seq_id=max(1, seq_id))
            content = body.model_dump()
            self.submit(tenant, model.id, body.seq_id, "unload_model", _content(body), content)

    def _make_room(self, tenant: Tenant) -> None:
        """Have a tenant have one model open less than it may; refuse where none can be closed.

        Those are whose session has given no sign of life for a while, the longest silent first.
        """
        now = time.monotonic()
        open_models = self.ledger.models_of(tenant.name)
        silent_s = {one.id: now - self._last_sign(one.session_id) for one in open_models}
        open_models.sort(key=lambda one: -silent_s[one.id])
        excess = open_models[: max(0, len(open_models) - tenant.max_models + 1)]
        if any(silent_s[one.id] <= SESSION_LIFE_S for one in excess):
            raise Refusal(
                403,
                f"tenant {tenant.name} has {len(open_models)} models open, and may have "
                f"{tenant.max_models}; unload one, or wait a minute after a program has ended",
            )
        for model in excess:
            self._unload(tenant, model)

    def _last_sign(self, session_id: str) -> float:
        return self._seen_at.get(session_id, self._started_at)

    def check_session(self, tenant: Tenant, session_id: str) -> None:
        """Refuse a session that is not the tenant's."""
        if self.ledger.tenant_of_session(session_id) != tenant.name:
            raise Refusal(404, f"session {show(session_id)}: there is none of that name")

    def model(self, tenant: Tenant, model_id: str) -> ModelRow:
        """Return a tenant's model."""
        model = self.ledger.model(model_id)
        if model is None or model.tenant != tenant.name:
            raise Refusal(404, f"model {show(model_id)}: there is none of that name")
        return model

    def request(self, tenant: Tenant, request_id: str) -> RequestRow:
        """Return a tenant's request."""
        row = self.ledger.request(request_id)
        if row is None or row.tenant != tenant.name or row.is_forgotten:
            raise Refusal(410, f"request {show(request_id)}: there is none of that name any more")
        return row

    def checkpoint(self, tenant: Tenant, path: str, to_fetch: bool = False) -> CheckpointRow:
        """Return a tenant's checkpoint; operators may fetch everybody's."""
        row = self.ledger.checkpoint(path) if CHECKPOINT_PATH.fullmatch(path) else None
        may_see = row is not None and row.tenant == tenant.name
        if row is None or not (may_see or (to_fetch and tenant.is_operator)):
            raise Refusal(404, f"{show(path)}: there is no such checkpoint")
        return row

    # -- requests -------------------------------------------------------------------------------

    def create_model(self, tenant: Tenant, body: CreateModel) -> RequestRow:
        """Take in the making of a model."""
        adapter = body.lora_config
        attention, mlp = ATTENTION * adapter.train_attn, MLP * adapter.train_mlp
        modules = (*attention, *mlp, *(HEAD,) * adapter.train_unembed)
        if not modules:
            raise Refusal(400, "train_attn, train_mlp, train_unembed: want at least one of them")
        if adapter.rank > self.deployment.max_rank:
            most = self.deployment.max_rank
            raise Refusal(400, f"rank {show(adapter.rank)}: this service trains up to rank {most}")
        seed = secrets.randbelow(1 << 31) if adapter.seed is None else adapter.seed
        return self._first(tenant, "create_model", body, (adapter.rank, modules, seed))

    def load_weights(self, tenant: Tenant, body: LoadWeights) -> RequestRow:
        """Take in the loading of a checkpoint, as a new model or into a known one."""
        found = self.checkpoint(tenant, body.path)
        if body.model_id is not None:
            content = body.model_dump()
            return self.submit(
                tenant, body.model_id, body.seq_id, "load_weights", _content(body), content
            )
        source = self.model(tenant, found.model_id)
        adapter = (source.rank, source.target_modules, source.seed)
        return self._first(tenant, "load_weights", body, adapter)

    def _first(
        self,
        tenant: Tenant,
        kind: str,
        body: CreateModel | LoadWeights,
        adapter: tuple[int, tuple[str, ...], int],
    ) -> RequestRow:
        """Take in the first request of a model, which makes it."""
        if body.session_id is None or body.model_seq_id is None:
            raise Refusal(400, "session_id, model_seq_id: are missing; or give a model_id")
        self.check_session(tenant, body.session_id)
        if body.base_model not in (None, *self.deployment.names):
            names = self.deployment.names[0]
            raise Refusal(400, f"base_model {show(body.base_model)}: this service trains {names}")
        model_id = f"{body.session_id}:train:{body.model_seq_id}"
        rank, modules, seed = adapter
        if refusal := self.deployment.admission.refusal([(rank, modules)]):
            raise Refusal(400, f"rank {rank}: {refusal}; ask for a smaller one")
        with self._lock:
            if self.ledger.model(model_id) is None:
                self._make_room(tenant)
                metadata = body.user_metadata or {}
                row = ModelRow(
                    model_id, tenant.name, body.session_id, rank, modules, seed, metadata,
                    time.time(),
                )  # fmt: skip
                self.ledger.insert(models, vars(row))
        return self.submit(tenant, model_id, 0, kind, _content(body), body.model_dump())

    def submit(
        self,
        tenant: Tenant,
        model_id: str,
        seq_id: int | None,
        kind: str,
        body: bytes,
        content: Any,
    ) -> RequestRow:
        """Take in a request of a model; one with a number that is known is the same request.

        Without a number it comes after all that are known.
        """
        model = self.model(tenant, model_id)
        with self._lock:
            if kind != "unload_model":
                self._note_sign(model.session_id)
            if seq_id is None:
                seq_id = self.ledger.last_seq(model_id) + 1
            known = self.ledger.request_id(model_id, seq_id)
            if known is not None:
                return self.request(tenant, known)
            if not model.is_open:
                raise Refusal(400, f"model {model_id}: is closed; load a checkpoint of it")
            if seq_id <= model.snapshot_seq:
                raise Refusal(410, f"model {model_id}: its request {seq_id} is long over")
            if kind != "unload_model":
                self._quotas.check_waiting(tenant, model_id, seq_id)
            if kind == "save_weights_for_sampler" and content["path"] is None:
                self._quotas.check_samplers(tenant)
            if kind in LOSS_KINDS:
                self._quotas.check_stored(tenant)
                self._quotas.spend(tenant, content.num_tokens)
            row = RequestRow(
                secrets.token_hex(16), tenant.name, model_id, seq_id, kind, body, time.time()
            )
            self.ledger.insert(requests, vars(row))
        self.coordinator.submit(row, content)
        return row

    @contextmanager
    def passing_over(
        self, tenant: Tenant, model_id: str | None, seq_id: int | None
    ) -> Iterator[None]:
        """Have what follows a numbered request carried out although this one is refused.

        Its sender, who has to hear why, does not send that number again, unless it is to wait.
        """
        try:
            yield
        except (Refusal, ConfigError) as error:
            if getattr(error, "status", 400) != 429 and model_id is not None and seq_id is not None:
                self.pass_over(tenant, model_id, seq_id, str(error))
            raise

    def pass_over(self, tenant: Tenant, model_id: str, seq_id: int, why: str) -> None:
        """Note that a request was refused, if it is a tenant's and its number was not known."""
        with self._lock:
            model = self.ledger.model(model_id)
            if model is None or model.tenant != tenant.name or not model.is_open:
                return
            now = time.time()
            row = RequestRow(
                secrets.token_hex(16), tenant.name, model_id, seq_id, "nothing", b"null", now, now,
                error=why,
            )  # fmt: skip
            if not model.snapshot_seq < seq_id < MOST_NUMBER or not self.ledger.insert(
                requests, vars(row)
            ):
                return
        self.coordinator.submit(row, None)

    # -- samples --------------------------------------------------------------------------------

    def new_sampler(self, tenant: Tenant, body: CreateSampler) -> str:
        """Return the name of a session that samples from a checkpoint or the base model."""
        self.check_session(tenant, body.session_id)
        if body.model_path is None and body.base_model not in self.deployment.names:
            names = self.deployment.names[0]
            name = show(body.base_model)
            raise Refusal(400, f"base_model {name}: this service samples from {names}")
        path = "" if body.model_path is None else self.checkpoint(tenant, body.model_path).path
        name = sampler_name(body.session_id, body.sampling_session_seq_id)
        if self.ledger.sampler(name) is None:
            self._quotas.check_samplers(tenant)
        self._note_sign(body.session_id)
        self.ledger.insert(samplers, {"id": name, "tenant": tenant.name, "path": path})
        return name

    def sampler(self, tenant: Tenant, sampler_id: str) -> SamplerRow:
        """Return a tenant's sampling session."""
        row = self.ledger.sampler(sampler_id)
        if row is None or row.tenant != tenant.name:
            raise Refusal(404, f"sampler {show(sampler_id)}: there is none of that name")
        return row

    def sample(self, tenant: Tenant, body: Sample) -> RequestRow:
        """Take in a request for samples."""
        self.sampler(tenant, body.sampling_session_id)
        tokens = [token for chunk in body.prompt.chunks for token in chunk.tokens]
        vocab_size, longest = self.deployment.shape.vocab_size, self.deployment.max_context
        if not tokens or not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise Refusal(400, f"prompt: want tokens of this model, from 0 to {vocab_size - 1}")
        if len(tokens) + (body.sampling_params.max_tokens or 1) > longest:
            raise Refusal(
                400,
                f"prompt, max_tokens: {len(tokens)} tokens and those asked for are more than the "
                f"{longest} that this model is sampled with",
            )
        if body.sampling_params.seed is None:
            body.sampling_params.seed = secrets.randbelow(1 << 31)
        with self._lock:
            known = self.ledger.request_id(body.sampling_session_id, body.seq_id)
            if known is not None:
                return self.request(tenant, known)
            self._note_sign(body.sampling_session_id.partition(":")[0])
            self._quotas.check_waiting(tenant, body.sampling_session_id, body.seq_id)
            self._quotas.check_stored(tenant)
            most_tokens = len(tokens) + self._max_tokens(body, len(tokens))
            self._quotas.spend(tenant, most_tokens * body.num_samples)
            row = RequestRow(
                secrets.token_hex(16), tenant.name, body.sampling_session_id, body.seq_id, SAMPLE,
                _content(body), time.time(),
            )  # fmt: skip
            self.ledger.insert(requests, vars(row))
        self._submit_sample(row, body)
        return row

    def _max_tokens(self, body: Sample, prompt_tokens: int) -> int:
        """Return how many tokens a sample may have after its prompt."""
        return body.sampling_params.max_tokens or self.deployment.max_context - prompt_tokens

    def _submit_sample(self, row: RequestRow, body: Sample) -> None:
        sampler, params = self.ledger.sampler(body.sampling_session_id), body.sampling_params
        assert sampler is not None and params.seed is not None
        prompt = [token for chunk in body.prompt.chunks for token in chunk.tokens]
        stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        found = self.ledger.checkpoint(sampler.path) if sampler.path else None
        if sampler.path and found is None:
            return self.sampling.give_up(row.id)
        content = SampleRequest(
            np.array(prompt, dtype=np.int32),
            body.num_samples,
            self._max_tokens(body, len(prompt)),
            params.temperature,
            params.top_k,
            params.top_p,
            params.seed,
            tuple(stop for stop in stops if isinstance(stop, int)),
            tuple(stop for stop in stops if isinstance(stop, str)),
            bool(body.prompt_logprobs),
            None if found is None else self.deployment.state_folder.checkpoint(found),
        )
        self.sampling.submit(row.id, row.tenant, content)


def _content(body: Body) -> bytes:
    return body.model_dump_json().encode()
