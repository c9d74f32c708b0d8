#!/bin/sh
# A cron job that needs an API key while it runs. In the crontab:
#
#   15 3 * * *  KEYPOOL_URL=http://127.0.0.1:8888 KEYPOOL_TOKEN_FILE=/etc/keypool/token /opt/nightly.sh
#
# `keypool run` waits for a key, puts it into the environment of the command, and gives it back when the command
# ends, however it ends. The exit status is the command's; those from 120 to 127 are keypool's own.
set -u

keypool run --wait 60 --env API_KEY -- sh -c '
    # Put the job here. The key is in $API_KEY; keep it off command lines, which everybody can see.
    printf "exporting with a key of %s characters\n" "${#API_KEY}"
'
status=$?

case $status in
    121) echo "nightly export: keypool can't be reached" >&2 ;;
    122) echo "nightly export: keypool refuses the token" >&2 ;;
    123) echo "nightly export: no key was free; it runs again tomorrow" >&2 ;;
    124) echo "nightly export: stopped, since it took longer than its lease" >&2 ;;
esac
exit "$status"
