// pm2 start deploy/ecosystem.config.cjs — see deploy/README.md
const path = require("path");

const root = process.env.RATCHET_ROOT || path.resolve(__dirname, "..");
const home = process.env.RATCHET_HOME_DIR || path.join(root, "ratchet-home");

module.exports = {
  apps: [
    {
      name: "ratchet",
      script: path.join(root, ".venv/bin/ratchet"),
      args: ["up", "--config", path.join(home, "ratchet.toml")],
      cwd: home,
      interpreter: "none",
      autorestart: true,
      exp_backoff_restart_delay: 200,
      // pm2 sends SIGINT and kills after 1.6 s; Ratchet finishes its batch and lets the trainer write a checkpoint, which takes up to 30 s.
      kill_timeout: 35000,
      max_restarts: 1000,
      min_uptime: 5000,
      merge_logs: true,
      time: false,
    },
  ],
};
