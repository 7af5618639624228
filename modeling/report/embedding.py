"""Vectors in two dimensions: PCA, t-SNE and UMAP."""

import warnings
from dataclasses import dataclass

import numpy as np

MOST_ROWS = 4000  # points of a picture; t-SNE of all rows of a large data set takes minutes
PCA_WIDTH = 50  # what t-SNE and UMAP read, as van der Maaten and Hinton did (JMLR 2008, section 4.2)
TSNE_STEPS = 500
METHODS = ("PCA", "t-SNE", "UMAP")


@dataclass(frozen=True)
class Embedded:
    """Points (N, 2) by method. `explained`: the share of the variance along PCA's two axes."""

    points: dict[str, np.ndarray]
    explained: tuple[float, float]


def chosen_rows(first: np.ndarray, others: np.ndarray, labels: np.ndarray, most: int = MOST_ROWS) -> np.ndarray:
    """Ascending row numbers, at most `most`: those of `first`, then of `others` the same share of every class. All by
    a fixed seed."""
    generator = np.random.default_rng(0)
    if len(first) >= most:
        return np.sort(generator.permutation(first)[:most])
    room = most - len(first)
    if len(others) <= room:
        return np.sort(np.concatenate([first, others]))
    drawn = generator.permutation(others)
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    every = np.linspace(0, len(drawn) - 1, room).round().astype(int)
    return np.sort(np.concatenate([first, drawn[every]]))


def embed(vectors: np.ndarray, seed: int = 0) -> Embedded:
    """Of (N, D): PCA; t-SNE (van der Maaten and Hinton 2008) and UMAP (McInnes et al. 2018) of the first 50 principal
    components. Methods that need more rows than there are are left out."""
    from sklearn.decomposition import PCA

    width = min(PCA_WIDTH, *vectors.shape)
    pca = PCA(width, svd_solver="randomized" if width < min(vectors.shape) else "full", random_state=seed)
    with np.errstate(invalid="ignore", divide="ignore"):  # all rows alike have no variance to explain
        components = pca.fit_transform(vectors.astype(np.float32))
    plane = components[:, :2] if width > 1 else np.c_[components, np.zeros(len(components))]
    shares = np.nan_to_num(pca.explained_variance_ratio_)
    explained = (float(shares[0]), float(shares[1]) if width > 1 else 0.0)
    points = {"PCA": plane}
    if len(vectors) > 10:
        points["t-SNE"] = _tsne(components, seed)
        points["UMAP"] = _umap(components, seed)
    return Embedded({name: np.asarray(xy, np.float64) for name, xy in points.items()}, explained)


def _tsne(components: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(components) - 1) / 3)
    start = "pca" if components.shape[1] > 1 else "random"
    tsne = TSNE(init=start, perplexity=perplexity, max_iter=TSNE_STEPS, random_state=seed)
    points: np.ndarray = tsne.fit_transform(components)
    return points


def _umap(components: np.ndarray, seed: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its libraries, none a user could act upon
        from umap import UMAP  # compiles its functions: seconds

        start = "pca" if components.shape[1] > 1 else "random"
        neighbours = nearest(components, min(15, len(components) - 1))
        mapper = UMAP(
            n_neighbors=neighbours[0].shape[1],
            precomputed_knn=neighbours,
            init=start,
            random_state=seed,
            n_jobs=1,
        )
        points: np.ndarray = mapper.fit_transform(components)
    return points


def nearest(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of (N, D) each point's `count` nearest, itself the first: (N, count) row numbers, and their distances.

    Exact, as UMAP's own of so few points; but to find them UMAP compiles for some four seconds.
    """
    from sklearn.neighbors import NearestNeighbors

    distances, others = NearestNeighbors(n_neighbors=count - 1).fit(points).kneighbors()
    rows = np.hstack([np.arange(len(points))[:, None], others])
    return rows, np.hstack([np.zeros((len(points), 1)), distances])
