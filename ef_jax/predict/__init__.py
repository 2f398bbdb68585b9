"""Which experts come next: numpy over ids."""

from ef_jax.predict.accuracy import Accuracy as Accuracy
from ef_jax.predict.history import History as History
from ef_jax.predict.oracle import Oracle as Oracle
from ef_jax.predict.paths import Paths as Paths
from ef_jax.predict.prediction_cache import PredictionCache as PredictionCache
from ef_jax.predict.predictor import Predictor as Predictor
from ef_jax.predict.pregate import Pregate as Pregate
