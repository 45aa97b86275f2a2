// Keeps NNI's page to this machine and to pages of its own, and its tuner's process from outliving it. NNI 3.0
// listens on every interface, asks for no password and lets whoever reaches it read any file; it has no option to
// change that. Loaded into its Node by
//   NODE_OPTIONS="--require=\"$PWD/loopback.cjs\"" nnictl create --config config.yml
"use strict";
const childProcess = require("child_process");
const http = require("http");
const net = require("net");

const LOOPBACK = "127.0.0.1";

// listen(port) means every interface, so a port that comes without a host gets one.
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (...args) {
  const [first, second] = args;
  if (typeof first === "number" && typeof second !== "string") {
    args.splice(1, 0, LOOPBACK);
  } else if (first?.port !== undefined && !first.host) {
    args[0] = { ...first, host: LOOPBACK };
  }
  return listen.apply(this, args);
};

// This machine's browser brings the whole web along: a page of anybody's may ask for localhost, or give its
// own name that address (DNS rebinding). What it asks for then bears that name, as Host or Origin.
const LOCAL = /^(https?:\/\/)?(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$/i;
const isLocal = ({ host = "localhost", origin = "localhost" }) =>
  LOCAL.test(host) && LOCAL.test(origin);

const emit = http.Server.prototype.emit;
http.Server.prototype.emit = function (event, ...args) {
  const [request, answer] = args;
  if (event === "upgrade" && !isLocal(request.headers)) {
    answer.destroy(); // a socket
    return true;
  }
  if (event === "request" && !isLocal(request.headers)) {
    answer.writeHead(403).end("loopback.cjs: only for pages of localhost\n");
    return true;
  }
  return emit.call(this, event, ...args);
};

const endsWithParent = () =>
  childProcess.spawnSync("setpriv", ["--pdeathsig", "TERM", "true"]).status === 0;

// The page's TensorBoard button runs "tensorboard --bind_all ...". Without the shell that NNI puts
// in between, a folder may also have a space in its name.
const spawn = childProcess.spawn;
childProcess.spawn = function (command, args, options) {
  if (command === "tensorboard") {
    args = args.map((arg) => arg.replace(/^--bind_all /, ""));
    return spawn(command, [`--host=${LOOPBACK}`, ...args], { ...options, shell: false });
  }
  // The process of the tuner looks for a manager that was killed for 10 s more. Found by it, it would
  // mix with the tuner of the manager that `nnictl resume` starts, so Linux is asked to end it at once.
  if (Array.isArray(args) && args.includes("--exp_params") && endsWithParent()) {
    command = `exec setpriv --pdeathsig TERM ${command}`;
  }
  return spawn(command, args, options);
};
