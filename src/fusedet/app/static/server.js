// Calls of the server; a refusal becomes an Error with the sentence of the server.

async function call(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is it still running?");
  }
  if (answer.ok) return answer;
  const content = await answer.json().catch(() => ({}));
  const text = content.detail ?? `status ${answer.status}`;
  throw new Error(text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : "."));
}

/** Get JSON. */
export const getJson = async (path) => (await call(path)).json();

/** Get a file as a Blob. */
export const getBlob = async (path) => (await call(path)).blob();

/** Send an image file with query parameters; those that are null stay out. */
export function postImage(path, file, parameters, signal) {
  const form = new FormData();
  form.append("image", file, file.name ?? "image");
  const given = Object.entries(parameters).filter(([, value]) => value != null);
  return call(`${path}?${new URLSearchParams(given)}`, { method: "POST", body: form, signal });
}
