"""The model called on pairs equals the factor model it carries."""

import numpy as np
import torch
from test_pair_floors import GENES, make_pairs

from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.evaluation.gaussian_floors import ConditionalGaussianFloor
from modeling_gppc.evaluation.model_predictor import model_predictor
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction


def test_linear_path_of_the_model_is_the_numpy_reference():
    train, test = make_pairs(), make_pairs(n=40, seed=2)
    floor = ConditionalGaussianFloor()
    floor.ranks = (4,)
    floor.fit(train, train)
    config = GppcConfig(
        vocab_size=GENES, num_factors=4, hidden_size=8, readout_size=8, num_latents=2, use_network=False
    )
    model = GppcForPerturbationPrediction(config)
    response = model.model.linear_response
    with torch.no_grad():
        for name in ("loadings", "noise"):
            getattr(response, name).copy_(torch.as_tensor(getattr(floor.model, name)))
        response.gene_mean.copy_(torch.as_tensor(floor.model.mean))
        response.states.coupling[0].copy_(torch.as_tensor(floor.coupling))
    mean, variance = model_predictor(model, batch_size=16)(test)
    expected, expected_variance = floor.predict_moments(test)
    scored = test.scored  # imposed genes hold the imposed level in the model
    assert np.abs(mean - expected)[scored].max() < 1e-5
    assert np.abs(variance - expected_variance)[scored].max() < 1e-5
    blind, _ = model_predictor(model, batch_size=16)(test.without_revealed())
    assert np.abs(blind - floor.predict(test.without_revealed())).max() < 1e-5
