"""Likely causes of wrong gradients, from the pattern of their errors."""

from __future__ import annotations

import numpy as np

from torchcall.mliap._check._slopes import Slopes
from torchcall.mliap._check._trial import Trial
from torchcall.mliap._neighbors.frame import complete_cell

NOT_SMOOTH = (
    "Finite differences do not converge at any step: their error falls with the step as truncation "
    "does. The energy is not smooth here. Look for kinks, for a contribution that jumps at the "
    "cutoff, and for atoms that coincide."
)
_CONSTANT = (
    "The error stays constant as the step shrinks: the gradients are those of another function. "
    "Look for a detached tensor, `.data`, `no_grad`, or a part of the energy that is added after "
    "differentiation."
)
_RATIOS = {
    -1.0: "They have the opposite sign: forces were returned. Return the gradients, -forces.",
    2.0: "They are twice the derivatives: pairs are counted twice. The edges contain each pair "
    "in both directions, so a pair's energy is half the sum over its edges.",
    0.5: "They are half the derivatives: pairs are counted once in the gradients and twice in the "
    "energy, or edges act on one of their two atoms only.",
    -2.0: "They are -2 times the derivatives: forces, with pairs counted twice.",
    -0.5: "They are -1/2 times the derivatives: forces, with pairs counted once.",
}
_UNITS = {
    "Hartree and eV": 27.211386,
    "Bohr and Å": 0.529177,
    "Hartree/Bohr and eV/Å": 51.422067,
    "kcal/mol and eV": 23.060548,
    "kJ/mol and eV": 96.485332,
    "Rydberg and eV": 13.605693,
    "GPa and eV/Å³": 160.21766,
    "nm and Å": 10.0,
}


def rounding(trial: Trial, system: int) -> str:
    """Energies are too large for the dtype."""
    total = abs(float(trial.out.energy[system]))
    remedy = "Subtract the energies of isolated atoms."
    if trial.dtype == np.float32:
        remedy = "Use float64, or subtract the energies of isolated atoms in float64."
    elif not trial.is_precise:
        remedy = "Let the whole model compute in float64."
    return (
        f"Gradients could not be checked: the error of finite differences grows as the step "
        f"shrinks, as rounding does. The total energy is {total:.1e} eV and its rounding error "
        f"{float(trial.noise[system]):.0e} eV. {remedy}"
    )


def positions(slopes: Slopes) -> str:
    """Cause of wrong position gradients."""
    return _proportional(slopes) or _CONSTANT


def cells(trial: Trial, slopes: Slopes) -> str:
    """Cause of wrong cell gradients: which other quantity was returned in their place."""
    factor = _proportional(slopes)
    if factor:
        return factor
    error = np.abs(slopes.found - slopes.expected).max(0)
    judged = error > 1e-3 * slopes.scale.max(0)
    # Virials and volumes of systems without three vectors are a matter of convention.
    complete = judged & (np.abs(np.linalg.det(np.asarray(trial.graph.cell, float))) > 0)
    judged = complete if complete.any() else judged

    def residual(gradients: np.ndarray) -> float:
        meant = np.einsum("bkl,dbkl->db", gradients, slopes.moves)
        return float((np.abs(meant - slopes.found).max(0) / error)[judged].max(initial=0))

    text, gradients = min(_candidates(trial), key=lambda candidate: residual(candidate[1]))
    if residual(gradients) < 0.02:
        return text
    return (
        f"{_CONSTANT} If position_gradients pass, inspect the cell's part: offsets that are not "
        "multiplied by the differentiated cell, or a virial that was converted by hand."
    )


def _proportional(slopes: Slopes) -> str:
    """Describes c where `expected = c · found` in all directions; empty if there is none."""
    found, expected, scale = slopes.found, slopes.expected, slopes.scale
    if np.abs(found / scale).max() < 1e-6:
        return (
            "The energy does not change with small displacements. Look for positions or a cell "
            "that are rounded (cast to float16 or bfloat16) or not used."
        )
    square = (found * found / scale**2).sum()
    c = float((found * expected / scale**2).sum() / square)
    residual = (np.abs(expected - c * found) / scale).max() / max(1.0, abs(c))
    if residual > max(1e-3, float((slopes.uncertainty / scale).min())):
        return ""
    if abs(c) < 1e-3:
        return (
            "They vanish: the energy that was differentiated does not depend on this input. Look "
            "for `detach`, `.data`, `no_grad`, and copies that autograd does not follow."
        )
    for ratio, text in _RATIOS.items():
        if abs(c - ratio) < 0.02 * abs(ratio):
            return text
    for units, factor in _UNITS.items():
        for value in (factor, 1 / factor):
            if abs(abs(c) - value) < 0.01 * value:
                return f"They are {c:.4g} times the derivatives: {units} are mixed."
    return f"They are {c:.4g} times the derivatives: look for a factor, a unit or a detached part."


def _candidates(trial: Trial) -> list[tuple[str, np.ndarray]]:
    """Cell gradients that were meant, if the returned ones are another quantity."""
    returned = trial.out.cell_gradients
    assert returned is not None
    cell = np.asarray(trial.graph.cell, float)
    inverse = np.linalg.pinv(cell)
    back = inverse.transpose(0, 2, 1)
    x = np.asarray(trial.graph.positions, float)
    moment = np.zeros_like(cell)
    outer = np.einsum("nk,nl->nkl", x, trial.out.position_gradients)
    np.add.at(moment, trial.system, outer * trial.real[:, None, None])
    completed = np.asarray(complete_cell(trial.graph.cell, trial.graph.pbc), float)
    volume = np.abs(np.linalg.det(completed))[:, None, None]
    convert = "convert it with lattice_gradient_from_virial."
    result = [("They are transposed: row k belongs to lattice vector k.", returned.mT)]
    for sign, name in ((1, "dE/dε"), (-1, "-dE/dε")):
        virial = sign * returned
        result += [
            (f"They are the virial {name}: {convert}", back @ (virial - moment)),
            (
                f"They are a stress of the convention {name} / V: multiply it by the volume"
                f"{'' if sign > 0 else ' and -1'}, then {convert}",
                back @ (virial * volume - moment),
            ),
            (
                f"They are {'' if sign > 0 else '-'}hᵀ ∂E/∂h: multiply by h⁻ᵀ from the left.",
                back @ virial,
            ),
        ]
    result.append(
        (
            "They are derivatives at fixed fractional coordinates; those at fixed Cartesian "
            "positions are expected. Differentiate by the cell alone, or subtract Σ s ⊗ ∂E/∂r.",
            returned - back @ moment,
        )
    )
    return result
