"""Engines of one model on one set of programs, each with a cache, a link and a way of prefetching of its own."""

import dataclasses
from typing import Any

from ef_jax.lossy import LOSSLESS, LossyOptions
from ef_jax.memory.plan import MemoryPlan, MemoryRequest
from ef_jax.memory.policies import make_policy
from ef_jax.memory.residency import Residency
from ef_jax.planning import plan_model
from ef_jax.predict import History, Predictor, Pregate
from ef_jax.prefetching import DISTANCES, Prefetching
from ef_jax.runtime.compute_in_place import ComputeInPlace
from ef_jax.runtime.engine import Engine
from ef_jax.runtime.host_experts import HostExperts
from ef_jax.runtime.language_model import LanguageModel
from ef_jax.runtime.light_misses import light_misses
from ef_jax.runtime.look_ahead import LookAhead, LookAheadSpec
from ef_jax.runtime.programs import Programs
from ef_jax.schedule.device_link import DeviceLink
from ef_jax.schedule.emulated_link import EmulatedLink
from ef_jax.schedule.link_model import LinkModel
from ef_jax.schedule.miss_costs import check_miss


class EmulatedModels:
    """Models over the host store and the dense weights of `lm`, which must be all-resident and stays usable.

    All have a pool of one size, so that nothing is compiled twice: slots that a cache does not have are staging. Copies
    are made inside of inserts, which is the default on CPU.

    Args:
      lm: the all-resident model.
      look: what programs compute of coming layers.
      correction: the trained one, where `look` has one.
    """

    def __init__(self, lm: LanguageModel, look: LookAheadSpec | None = None, correction: Any = None) -> None:
        engine = lm._engine
        self.look = look or LookAheadSpec(distances=min(DISTANCES, len(lm.spec.moe_layers)))
        self.lm, self._correction = lm, correction
        link = engine.link
        self._store = (link._link if isinstance(link, EmulatedLink) else link)._store
        self._plan, self._looking = self._programs(LOSSLESS)
        self._blind = self._looking.without_look_ahead()

    def _programs(self, lossy: LossyOptions) -> tuple[MemoryPlan, Programs]:
        lm, plan = self.lm, self.lm.plan
        request = MemoryRequest(expert_fraction=1.0, batch=plan.batch, context=plan.context, chunk=plan.chunk)
        looking = {"look_ahead": self.look, "prefetches": True}
        return plan_model(lm.spec, request, lm._engine.device, "in_program", **looking, lossy=lossy)

    def make(
        self,
        fraction: float,
        link: LinkModel,
        *,
        prefetch: int | str = "auto",
        predictor: str | Predictor | None = "pregate",
        policy: str = "lru",
        candidates: str = "value",
        order: str = "auto",
        miss: str = "fetch",
        skip: float | None = None,
        host_kind: type[HostExperts] = HostExperts,
        link_kind: type[EmulatedLink] = EmulatedLink,
        device_link_kind: type[DeviceLink] = DeviceLink,
        **link_options: Any,
    ) -> LanguageModel:
        """A model with slots for a share of the experts.

        Args:
          fraction: share of the experts that have a slot, below 1.
          link: the emulated link.
          prefetch, policy, candidates, order: as for `ef_jax.load`.
          predictor: "pregate", which the programs compute, with their correction if they have one; "history"; or an
            object, which hears the programs' bins. None: none, and programs that compute nothing of coming layers.
          miss: as for `ef_jax.load`.
          skip: as `lossy_skip` for `ef_jax.load`.
          host_kind: what computes missing experts, if `miss` says so.
          link_kind, device_link_kind: what the engine's link is made of.
          **link_options: further options of `link_kind`.
        """
        lm, spec = self.lm, self.lm.spec
        device = lm._engine.device
        shape = {"layers": len(spec.moe_layers), "experts": spec.experts.count}
        slots = int(fraction * self._plan.experts)
        total = self._plan.slots + self._plan.staging_slots
        plan = dataclasses.replace(self._plan, slots=slots, staging_slots=total - slots)
        looking = None
        if predictor is not None:
            looking = LookAhead(
                spec,
                self.look,
                lm._engine.dense,
                rows=plan.rows,
                sharding=lm._engine._rows.sharding,
                correction=self._correction,
            )
        if predictor == "pregate":
            predictor = Pregate(**shape, top_k=spec.experts.top_k, distances=self.look.distances)
        elif predictor == "history":
            predictor = History(**shape)
        real = device_link_kind(spec, self._store, device, slots=total, mode="in_program")
        emulated = link_kind(real, link, **link_options)
        residency = Residency(
            **shape,
            cache_slots=slots,
            staging_slots=total - slots,
            policy=make_policy(policy, **shape, cache_slots=slots),
        )
        lossy, programs = LOSSLESS, self._looking
        if skip is not None:
            lossy = LossyOptions(skip=skip)
            _, programs = self._programs(lossy)
        handlers = light_misses(programs, emulated, None, device, mode="in_program")
        if (checked := check_miss(miss)) != "fetch":
            host = host_kind(spec, self._looking.kernels, batch=plan.batch, device=device)
            handlers.append(ComputeInPlace(host, self._store, emulated, residency, checked))
        engine = Engine(
            spec,
            plan,
            programs if looking is not None else self._blind if skip is None else programs.without_look_ahead(),
            lm._engine.dense,
            residency,
            emulated,
            device,
            look_ahead=looking,
            predictor=predictor,
            prefetching=Prefetching(prefetch=prefetch, predictor="none" if predictor is None else "pregate"),
            candidates=candidates,
            order=order,
            miss_handlers=handlers,
            lossy=lossy,
        )
        return LanguageModel(lm.path, spec, engine, lm.tokenizer)
