"""Which device holds which expert, and which device a request goes to: tables over ids, made from recorded routing."""

from ef_jax.placement.dispatch import Dispatch as Dispatch
from ef_jax.placement.dispatch import dispatch as dispatch
from ef_jax.placement.dispatch import request_scores as request_scores
from ef_jax.placement.dispatch import token_affinity as token_affinity
from ef_jax.placement.exchange import Exchange as Exchange
from ef_jax.placement.exchange import exchange as exchange
from ef_jax.placement.placement import Placement as Placement
from ef_jax.placement.placement_file import load_placement as load_placement
from ef_jax.placement.placement_file import read_placement as read_placement
from ef_jax.placement.placement_file import save_placement as save_placement
from ef_jax.placement.solve import PLACEMENTS as PLACEMENTS
from ef_jax.placement.solve import place as place
