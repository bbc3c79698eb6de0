# The tag is for people, the digest for machines: it names one image for every platform. To renew both, and to build from
# a mirror: --build-arg BASE_IMAGE=…
ARG BASE_IMAGE=python:3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

FROM ${BASE_IMAGE} AS installed
COPY requirements.lock /
RUN python3 -m venv --without-pip /venv \
    && python3 -m pip --python /venv/bin/python install --no-cache-dir --no-compile --disable-pip-version-check \
        --require-hashes --no-deps --only-binary :all: -r /requirements.lock
COPY src /app
# Compiled here, as nothing can be at run time; by content, so that the same sources give the same bytes.
RUN python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /venv/lib /app

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="voicepass" \
      org.opencontainers.image.description="Signed-in users get a single-use ElevenLabs signed URL; the API key stays on the server." \
      org.opencontainers.image.licenses="MIT"
RUN echo 'voicepass:x:10001:10001::/data:/usr/sbin/nologin' >> /etc/passwd \
    && install -d -o 10001 -g 10001 /data
COPY --from=installed /venv /venv
COPY --from=installed /app /app
ENV PATH=/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PORT=8000 \
    VOICEPASS_ENV_FILE=/dev/null
# /dev/null: the working directory is a volume, and a .env in it must not change the settings.
# The ledger's default, sqlite:///voicepass.db, lies here. Nothing else is written but to /tmp: the root may be read-only.
WORKDIR /data
VOLUME /data
# A number, for Kubernetes cannot tell of a name that it is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/healthz', timeout=2)"]
ENTRYPOINT ["python", "-m", "voicepass"]
CMD ["serve", "--host", "0.0.0.0"]
