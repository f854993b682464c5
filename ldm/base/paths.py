"""Where a project keeps what its stages make, relative to the project's folder. `dvc.yaml` names the same paths."""

SOURCE = "data/raw/source"
SHARDS = "data/shards"
LATENTS = "data/latents"
PRETRAINED = "models/pretrained"  # what autoencoder.pretrained names
INITIAL = "models/initial"  # what train_unet.init names
AUTOENCODER = "models/autoencoder"
UNET = "models/unet"
MODEL = "models/ldm"
POSTERIOR = "models/posterior"

METRICS = "reports/metrics.json"
METRICS_TABLE = "reports/metrics.csv"
BOUNDS = "reports/bounds.csv"
SAMPLES = "reports/samples.png"
REPORT = "reports/report.html"
DECISION = "reports/decision.html"
PLOTS = "reports/plots"
POSTERIOR_REPORTS = "reports/posterior"
CURVES = "reports/curves"
VAE_CURVE = f"{CURVES}/train_vae.csv"
UNET_CURVE = f"{CURVES}/train_unet.csv"

CODE = ".ldm/code.yaml"  # fingerprints of the stages' code
WORK = ".ldm/work"  # unfinished trainings
LATENT_STORE = ".ldm/store/latents"
SHARD_CACHE = ".ldm/shards"  # of shards at a URL
QUARANTINE = ".ldm/quarantine.csv"
HOME = ".ldm/home"  # for libraries, where the user's own home cannot be written
INGEST_LOCK = ".ldm/ingest.lock"
TRACKING = ".ldm/tracking"  # what stages have recorded and the flow has still to deliver
