"""What this machine does, measured once: link, memory, products, disk, and the engine on the bundled model."""

from ef_jax.doctor.measure import STEPS as STEPS
from ef_jax.doctor.measure import measure_machine as measure_machine
