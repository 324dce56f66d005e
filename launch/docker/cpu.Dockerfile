# posttrain on CPUs, in the locked versions. From the project's folder:
#   docker build --file launch/docker/cpu.Dockerfile --tag posttrain:cpu .
#   docker run --rm --volume "$PWD:/runs" posttrain:cpu check recipe.yaml
FROM python:3.11-slim-bookworm

# bubblewrap: the sandbox of the verifier `code`; git: environment.json names the commit.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends bubblewrap git \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 posttrain

WORKDIR /opt/posttrain
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock \
 && grep -o '^[a-z0-9-]*==[0-9a-z.]*' requirements.lock > pins.txt
COPY . ./
# What the locked versions need beside on this system, and posttrain itself.
RUN pip install --no-cache-dir --constraint pins.txt .

USER 1000
WORKDIR /runs
ENTRYPOINT ["posttrain"]
CMD ["--help"]
