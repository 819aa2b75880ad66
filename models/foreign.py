"""What lies inside scikit-learn (1.5 to 1.9), of which no public function tells; tests/unit/test_regressors.py holds it
to predict the same."""

from typing import Any

import numpy as np


def full_trees(boosted: Any, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return the trees of a fitted HistGradientBoostingRegressor as full binary trees of so many levels: the feature
    and the threshold of each inner node (trees, 2^depth - 1), the value of each leaf (trees, 2^depth), and what is
    added to their sum.

    The children of node i are 2 i + 1 and 2 i + 2. A leaf above the last level stands for all leaves below it.
    """
    trees = boosted._predictors
    inner = 2**depth - 1
    feature, threshold = np.zeros((len(trees), inner), np.int32), np.full((len(trees), inner), np.inf)
    leaf = np.zeros((len(trees), inner + 1))
    for number, (tree,) in enumerate(trees):
        nodes, places = tree.nodes, {0: 0}  # node of scikit-learn's -> place
        for index, node in enumerate(nodes):  # parents come before their children
            place = places[index]
            if node["is_leaf"]:
                level = (place + 1).bit_length() - 1
                first = (place + 1) * 2 ** (depth - level) - 1 - inner
                leaf[number, first : first + 2 ** (depth - level)] = node["value"]
            else:
                feature[number, place], threshold[number, place] = node["feature_idx"], node["num_threshold"]
                places |= {int(node["left"]): 2 * place + 1, int(node["right"]): 2 * place + 2}
    return feature, threshold, leaf, float(np.squeeze(boosted._baseline_prediction))
