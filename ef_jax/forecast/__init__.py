"""How fast a model will be on a machine, before it is loaded or even downloaded: arithmetic over specs and figures."""

from ef_jax.forecast.forecast import Forecast as Forecast
from ef_jax.forecast.forecast import Speed as Speed
from ef_jax.forecast.forecast import forecast as forecast
from ef_jax.forecast.hit_rate import HitRate as HitRate
from ef_jax.forecast.hit_rate import distinct_experts as distinct_experts
from ef_jax.forecast.hit_rate import prior_hit_rate as prior_hit_rate
from ef_jax.forecast.hit_rate import replayed_hit_rate as replayed_hit_rate
from ef_jax.forecast.machine import Machine as Machine
from ef_jax.forecast.machines import MACHINES as MACHINES
from ef_jax.forecast.machines import find_machine as find_machine
from ef_jax.forecast.workspace import arithmetic_plan as arithmetic_plan
