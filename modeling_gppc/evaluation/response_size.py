"""From the change at a perturbation's target to the size of the response that follows."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class ResponseSize:
    """From a change at the target to the size of the response; the direction is not touched.

    `share * s * tanh(change / s)` takes the place of the change, with `s = saturation *` the target's standard deviation
    among controls. Neither number was fitted to a screen:

    - Control cells say which genes go together, not why. Of a correlation's three explanations (the target acts on the
      gene, the gene on the target, something on both; Reichenbach) one is an effect of the target: `share = 1/3`.
    - They say it within the range in which the target varies among them; beyond it nothing is known of the response, and
      it is held at what one standard deviation gives: `saturation = 1`.

    Args:
        share (`float`, *optional*, defaults to 1/3): Share of the response that follows.
        saturation (`float`, *optional*, defaults to 1): Change at which the response levels off, in standard deviations
            of the target among controls.
        unexplained (`float`, *optional*, defaults to 0.06): Standard deviation of true responses about predicted ones,
            in units of the gene's standard deviation among controls.
    """

    share: float = 1 / 3
    saturation: float = 1.0
    unexplained: float = 0.06

    def __call__(self, change: np.ndarray, spread: np.ndarray | float = 1.0) -> np.ndarray:
        """The change that the response answers to; `spread` is the target's standard deviation among controls."""
        unit = np.maximum(self.saturation * np.asarray(spread, dtype=float), 1e-9)
        return self.share * unit * np.tanh(change / unit)
