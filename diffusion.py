"""Diffusion: schedules, losses, classifier-free guidance and samplers.

Data x_0 is hidden in normal noise eps, a network learns to tell the noise, and a sampler uses it to walk back:

    x_t = alpha(t) x_0 + sigma(t) eps,   alpha^2 + sigma^2 = 1,   t from 0 (data) to 1 (noise)      Schedule.alpha_sigma
    minimise |network(x_t, t, y) - eps|^2 over t and eps                                            Schedule.loss
    x <- a little less noisy x, in `steps` steps from t = 1 down to 0                               SAMPLERS

    schedule = SCHEDULES["vp"]()
    loss = schedule.loss(model, x0, y).mean()                               # one training step's loss
    denoise = guide(model, schedule, y, null=10, w=1.5)                     # (x, t) -> the network's output
    x0 = SAMPLERS["dpm_solver"](denoise, schedule, x_T, steps=50)           # noise in, images out

Time is a float in [0, 1] everywhere; step n of N of a discrete schedule is t = n / N. What a network is fed instead
(999 t, n, or n - 1) is `schedule.model_time(t)`. Times and coefficients are float64, images keep their type. A
denoiser is any function (x, t) -> noise of x's shape, or (N, 2C, ..) where the last C channels give a learned variance.

Sources: VP and its SDE: Song et al., arXiv:2011.13456. DDPM: Ho et al., arXiv:2006.11239. Learned variance and
respacing: Nichol & Dhariwal, arXiv:2102.09672. DDIM: Song et al., arXiv:2010.02502. Guidance: Ho & Salimans,
arXiv:2207.12598. DPM-Solver and DPM-Solver++: Lu et al., arXiv:2206.00927 and arXiv:2211.01095. test_all.py compares
them with trajectories of the released code of U-ViT and DiT: they agree within 2e-6 (but for times that the released
VP DPM-Solver keeps in float32: 1.3e-4 at 10 evaluations).
"""
import math
from functools import partial

import numpy as np
import torch
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: how fast the signal fades


class Schedule:
    """What every schedule shares. Each adds four functions of its own:

    log_alpha(t), and its inverse time_of_log_alpha(log_alpha)
    beta(t) = -2 d log alpha / dt, the rate of the forward process dx = -beta/2 x dt + sqrt(beta) dw
    model_time(t), the time that the network is fed for t

    Times t may be floats or tensors of any shape and device; answers are float64 tensors of t's shape and device.
    """

    t_min = 1e-4      # the last time of the DPM-Solvers: at t = 0 the log-SNR is infinite

    def training_time(self, u):
        """Uniform numbers u in [0, 1) -> the times to train at."""
        return u

    def times(self, steps):
        """`steps` evenly spaced times, descending from 1, at which the ancestral sampler and DDIM call the network."""
        return torch.linspace(1, 1e-3, steps, dtype=torch.float64)

    def alpha_sigma(self, t):
        """(alpha, sigma) at t. sigma from expm1: 1 - alpha^2 would lose all digits near t = 0."""
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def half_log_snr(self, t):
        """lambda(t) = log(alpha / sigma), the time in which DPM-Solver takes its steps."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha.log() - sigma.log()

    def time(self, half_log_snr):
        """The inverse of half_log_snr."""
        return self.time_of_log_alpha(-0.5 * torch.nn.functional.softplus(-2 * float64(half_log_snr)))

    def loss(self, model, x0, y=None, t=None, noise=None):
        """Loss of each image, (N,): the mean squared error of the predicted noise (DDPM, equation 14).

        model   (x_t, network time (N,), y) -> (N, C, H, W); or (N, 2C, H, W), whose second half is a learned variance,
                and then the variational bound that trains it is added (schedule "ddpm" only)
        x0      (N, C, H, W), scaled to [-1, 1] or to unit variance;  y: labels or text features, passed on to the model
        t       (N,) in [0, 1], drawn uniformly where not given;  noise: like x0, drawn where not given
        """
        if t is None:
            t = self.training_time(torch.rand(len(x0), device=x0.device, dtype=torch.float64))
        if noise is None:
            noise = torch.randn_like(x0)
        alpha, sigma = (per_image(a, x0) for a in self.alpha_sigma(t))
        x_t = alpha * x0 + sigma * noise                                    # (N, C, H, W)
        out = model(x_t, self.model_time(t).to(x0.dtype), y).to(x0.dtype)   # the loss is not taken in bf16
        eps, v = split(out, x0)
        loss = (eps - noise).square().flatten(1).mean(1)                    # (N,)
        if v is not None:
            predicted_x0 = (x_t - sigma * eps.detach()) / alpha
            loss = loss + self.variational_bound(x0, x_t, predicted_x0, t, v)
        return loss

    def variational_bound(self, x0, x_t, predicted_x0, t, v):
        raise ValueError(f"schedule {type(self).__name__} trains no variance: build the model with learn_sigma=False")

    def posterior(self, s, t):
        """q(x_s | x_t, x_0) for s < t is normal with mean c0 x_0 + ct x_t. Returns c0, ct and its variance's bounds.

        The variance is `low` (beta~) if x_0 is a point and `high` (beta) if x_0 is unit normal; a learned variance lies
        between them (DDPM, equations 6 and 7, for any pair of times).
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        high = -torch.expm1(2 * (self.log_alpha(t) - self.log_alpha(s)))
        low = high * (sigma_s / sigma_t) ** 2
        return alpha_s * high / sigma_t**2, alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, low, high


class VP(Schedule):
    """Variance-preserving SDE, beta(t) = 0.1 + 19.9 t: U-ViT on pixels. The network sees 999 t."""

    beta_0, beta_1 = 0.1, 20.0

    def log_alpha(self, t):
        t = float64(t)
        return -0.5 * (self.beta_0 * t + (self.beta_1 - self.beta_0) * t**2 / 2)

    def time_of_log_alpha(self, log_alpha):
        integral = -2 * float64(log_alpha)                                  # of beta from 0 to t, a quadratic in t
        return 2 * integral / (self.beta_0 + (self.beta_0**2 + 2 * (self.beta_1 - self.beta_0) * integral).sqrt())

    def beta(self, t):
        return self.beta_0 + (self.beta_1 - self.beta_0) * float64(t)

    def model_time(self, t):
        return 999 * float64(t)


class Discrete(Schedule):
    """N steps with given betas: alpha(n/N)^2 = product of 1 - beta_i for i = 1..n; log alpha is linear in between."""

    def __init__(self, betas):
        self.steps, self.t_min = len(betas), 1 / len(betas)
        # log alpha at t = 0, 1/N, .. 1, float64 (N + 1,), on the device where it was needed last
        self.table = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0) / 2])

    def segment(self, t):
        """log alpha where the interval of the table that holds t begins and ends, and how far into it t is (0 to 1)."""
        position = float64(t) * self.steps
        index = position.floor().clamp(0, self.steps - 1).long()
        table = self.table = self.table.to(index.device)
        return table[index], table[index + 1], position - index

    def log_alpha(self, t):
        return torch.lerp(*self.segment(t))

    def time_of_log_alpha(self, log_alpha):
        log_alpha = float64(log_alpha)
        table = self.table = self.table.to(log_alpha.device)
        index = torch.searchsorted(-table, -log_alpha.contiguous()).clamp(1, self.steps) - 1
        return (index + (log_alpha - table[index]) / (table[index + 1] - table[index])) / self.steps

    def beta(self, t):
        start, end, _ = self.segment(t)
        return 2 * self.steps * (start - end)

    def model_time(self, t):
        return self.steps * float64(t)

    def training_time(self, u):
        return ((u * self.steps).floor() + 1) / self.steps

    def times(self, steps):
        if not 1 <= steps <= self.steps:
            raise ValueError(f"{steps} sampling steps: this schedule has 1 to {self.steps}")
        return (torch.linspace(self.steps - 1, 0, steps, dtype=torch.float64).round() + 1) / self.steps


class SD(Discrete):
    """Stable Diffusion's 1000 betas, linear in their square roots: U-ViT on latents. The network sees n in 1..1000."""

    def __init__(self):
        super().__init__(torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2)


class DDPM(Discrete):
    """1000 linear betas from 1e-4 to 0.02: DiT and U-DiT, with learned variance. The network sees n - 1 in 0..999."""

    def __init__(self):
        super().__init__(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))

    def model_time(self, t):
        return self.steps * float64(t) - 1

    def variational_bound(self, x0, x_t, predicted_x0, t, v):
        """The bound's term at t, (N,), in bits per number (Nichol & Dhariwal, section 3.1): it trains v, not eps.

        At n > 1 it is KL(q(x_{n-1} | x_n, x_0) | p(x_{n-1} | x_n)) of two normals, at n = 1 8-bit data's likelihood.
        """
        n = (t * self.steps).round()
        c0, ct, _, high = (per_image(a, x0) for a in self.posterior((n - 1) / self.steps, n / self.steps))
        # At n = 1 the posterior is a point: its variance is replaced by that of n = 2, as in the released code.
        later = n.clamp(min=2)
        low = per_image(self.posterior((later - 1) / self.steps, later / self.steps)[2], x0).log()
        log_variance = interpolate_variance(v, low, high.log())
        distance = (c0 * (x0 - predicted_x0)).square()
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance * (-log_variance).exp())
        likelihood = -log_likelihood_8bit(x0, c0 * predicted_x0 + ct * x_t, 0.5 * log_variance)
        bound = torch.where(per_image(n, x0) == 1, likelihood, kl)
        return bound.flatten(1).mean(1) / math.log(2)


SCHEDULES = {"vp": VP, "sd": SD, "ddpm": DDPM}


def float64(t):
    return torch.as_tensor(t, dtype=torch.float64)


def per_image(a, x):
    """(N,) numbers, one for each image, in x's type and ready to multiply x (N, C, H, W)."""
    return a.to(x).view(-1, *[1] * (x.ndim - 1))


def split(out, x):
    """A network's output -> (noise like x, learned variance like x or None). Raises ValueError on other channels."""
    channels = x.shape[1]
    if out.shape[0] != x.shape[0] or out.shape[1] not in (channels, 2 * channels) or out.shape[2:] != x.shape[2:]:
        raise ValueError(f"the model turned {tuple(x.shape)} into {tuple(out.shape)}: "
                         f"expected {channels} or {2 * channels} channels")
    return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None


def interpolate_variance(v, log_low, log_high):
    """Learned log variance: the network's v in [-1, 1] chooses between the two bounds."""
    return log_low + (v + 1) / 2 * (log_high - log_low)


def log_likelihood_8bit(x, mean, log_std):
    """log P of 8-bit data x (k / 127.5 - 1) under a normal: its mass within half a grey level, open at both ends."""
    def cdf(z):     # the released code's approximation of the normal's, kept to agree with it
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_std).exp())
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


# ---------------------------------------------------------------------------------------------------------------------
# From a network to a denoiser (x, t) -> output


def guide(model, schedule, y=None, null=None, w=1.0, channels=None):
    """A denoiser (x, t) -> output from a network and its condition, with classifier-free guidance.

    eps = eps_u + w (eps_c - eps_u): w = 1 is none and costs no second pass; U-ViT's s is w - 1. Both halves run as one
    batch. A learned variance is that of the conditional half.

    y         labels (N,), text features (N, T, F), or None for an unconditional model
    null      the null label (an int) or the empty text's features (T, F); needed where w is not 1
    channels  guide only so many of the first channels (3 of 4 in DiT's release), all where None
    Raises ValueError where w asks for guidance that y or null can not give.
    """
    if w != 1 and (y is None or null is None):
        raise ValueError(f"guidance w = {w} needs a conditional model, and its null label or the empty text's features")

    def denoise(x, t):
        time = schedule.model_time(t).to(x).expand(len(x))                  # (N,)
        if w == 1:
            return model(x, time, y).to(x)
        unconditional = torch.as_tensor(null, device=y.device, dtype=y.dtype).expand_as(y)
        out = model(torch.cat([x, x]), torch.cat([time, time]), torch.cat([y, unconditional])).to(x)
        conditional, unconditional = out.chunk(2)                           # each (N, C or 2C, H, W)
        k = x.shape[1] if channels is None else channels
        guided = torch.lerp(unconditional[:, :k], conditional[:, :k], w)
        return torch.cat([guided, conditional[:, k:]], dim=1)

    return denoise


def clamp_x0(denoise, schedule):
    """The same denoiser with its estimate of x_0 limited to [-1, 1], for pixels and networks still young.

    Near t = 1 that estimate divides by a tiny alpha: small errors of the network become large ones in overall colour.
    """
    def clamped(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        out = denoise(x, t)
        eps, _ = split(out, x)
        x0 = ((x - sigma * eps) / alpha).clamp(-1, 1)
        return torch.cat([(x - alpha * x0) / sigma, out[:, x.shape[1]:]], dim=1)

    return clamped


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: (denoise, schedule, x, steps) -> images, from noise x at t = 1
#
# Each calls the denoiser `steps` times. `randn` draws fresh noise like its argument, for the samplers that add any;
# `progress` shows a bar.


def progress_bar(steps, name, progress):
    return tqdm(steps, desc=name, unit="step", leave=False, disable=not progress)


def pairs(times):
    """Descending times -> (t, s) for each: it, and the one that follows; 0 follows the last."""
    return list(zip(times, torch.cat([times[1:], times.new_zeros(1)])))


def predicted_x0(denoise, schedule, x, t):
    """The image that the predicted noise leaves: (x_t - sigma eps) / alpha."""
    (alpha, sigma), (eps, _) = schedule.alpha_sigma(t), split(denoise(x, t), x)
    return (x - sigma * eps) / alpha


def euler(denoise, schedule, x, steps, randn=torch.randn_like, progress=False, level=1.0):
    """Euler-Maruyama on the reverse SDE (level 1), or Euler on the probability-flow ODE (level 0), to t = 0.

    dx = [-beta/2 x - (1 + level^2)/2 beta score] dt + level sqrt(beta) dw, score = -eps / sigma   (arXiv:2011.13456)
    """
    times = torch.linspace(1, 1e-3, steps, dtype=torch.float64)
    for t, s in progress_bar(pairs(times), "Euler", progress):
        beta, (_, sigma) = schedule.beta(t), schedule.alpha_sigma(t)
        eps, _ = split(denoise(x, t), x)
        x = x + (s - t) * beta / 2 * ((1 + level**2) / sigma * eps - x)
        if level and s > 0:
            x = x + level * (beta * (t - s)).sqrt() * randn(x)
    return x


def ancestral(denoise, schedule, x, steps, randn=torch.randn_like, progress=False):
    """DDPM's sampler: draw x_s from p(x_s | x_t) down a respaced chain. The variance is learned, or else beta~."""
    for t, s in progress_bar(pairs(schedule.times(steps)), "DDPM", progress):
        alpha, sigma = schedule.alpha_sigma(t)
        c0, ct, low, high = schedule.posterior(s, t)
        eps, v = split(denoise(x, t), x)
        x = c0 * (x - sigma * eps) / alpha + ct * x
        if s > 0:
            log_variance = low.log() if v is None else interpolate_variance(v, low.log(), high.log())
            x = x + (0.5 * log_variance).exp() * randn(x)
    return x


def ddim(denoise, schedule, x, steps, randn=None, progress=False):
    """DDIM with eta = 0: keep the predicted x_0 and eps, and mix them anew for the next time. Deterministic."""
    for t, s in progress_bar(pairs(schedule.times(steps)), "DDIM", progress):
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        eps, _ = split(denoise(x, t), x)
        x = alpha_s * (x - sigma * eps) / alpha + sigma_s * eps
    return x


def solver_times(schedule, part, grid):
    """The times at which a part (0 to 1) of the way from t = 1 to t_min is done, measured in "time" or in "log_snr"."""
    ends = torch.tensor([1, schedule.t_min], dtype=torch.float64)
    if grid == "time":
        return torch.lerp(*ends, part)
    return schedule.time(torch.lerp(*schedule.half_log_snr(ends), part))


def dpm_solver(denoise, schedule, x, steps, randn=None, progress=False, data=False):
    """DPM-Solver, single-step, third order where it can ("fast"): `steps` evaluations in all, to t_min. Deterministic.

    It solves for the noise prediction, in updates of equal length in lambda, with inner points evenly between. `data`:
    for the data prediction (DPM-Solver++, steadier under guidance), with `steps` intervals of equal length in time, of
    which an update of order k spans k.
    """
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: DPM-Solver needs at least 1")

    def predict(x, t):
        bar.update()
        return predicted_x0(denoise, schedule, x, t) if data else split(denoise(x, t), x)[0]

    # 3, 3, .. and what is left in one or two last updates, of low order: there is most curvature.
    orders = [3] * (steps // 3 - 1) + [2, 1] if steps % 3 == 0 else [3] * (steps // 3) + [steps % 3]
    with progress_bar(range(steps), "DPM-Solver++" if data else "DPM-Solver", progress) as bar:
        for i, k in enumerate(orders):
            nodes = torch.arange(k + 1, dtype=torch.float64)                # start, inner points and end of an update
            if data:
                times = solver_times(schedule, (sum(orders[:i]) + nodes) / steps, "time")
            else:
                times = solver_times(schedule, (i + nodes / k) / len(orders), "log_snr")
            x = dpm_step(predict, schedule, x, times, data)
    return x


def dpm_step(predict, schedule, x, times, data):
    """One step from times[0] to times[-1], of order len(times) - 1, with an evaluation at each but the last.

    In lambda the ODE is linear but for the prediction p(lambda). Solved exactly with p constant it gives, for noise,

        x_t = alpha_t / alpha_s x - sigma_t (e^h - 1) p(lambda_s),   h = lambda_t - lambda_s

    and higher orders add p's slope, from inner points. For data, alpha and sigma change places and h its sign: one code
    serves both. (DPM-Solver, algorithms 1 and 2; DPM-Solver++, appendix A.)
    """
    alpha, sigma = schedule.alpha_sigma(times)
    h = schedule.half_log_snr(times) - schedule.half_log_snr(times[0])
    carry, other, h = (sigma, alpha, -h) if data else (alpha, sigma, h)

    def first_order(i):
        return carry[i] / carry[0] * x - other[i] * torch.expm1(h[i]) * p0

    p0 = predict(x, times[0])
    if len(times) == 2:
        return first_order(1)
    p1 = predict(first_order(1), times[1])
    if len(times) == 3:
        return first_order(2) - other[2] * torch.expm1(h[2]) * h[2] / (2 * h[1]) * (p1 - p0)
    p2 = predict(first_order(2) - other[2] * (torch.expm1(h[2]) / h[2] - 1) * h[2] / h[1] * (p1 - p0), times[2])
    return first_order(3) - other[3] * (torch.expm1(h[3]) / h[3] - 1) * h[3] / h[2] * (p2 - p0)


def multistep(denoise, schedule, x, steps, randn=None, progress=False, grid="time"):
    """DPM-Solver++(2M): second order with one evaluation a step, since the slope comes from the step before.

    On the data prediction p, with h and h' the widths in lambda of this step and the one before (algorithm 2):

        x_t = sigma_t / sigma_s x - alpha_t (e^-h - 1) (p + h / (2 h') (p - p'))

    The first step has no step before it, and the last of fewer than 15 is safer without: they are of first order.
    grid: `steps` intervals even in "time" or in "log_snr", from t = 1 to t_min. Deterministic.
    """
    times = solver_times(schedule, torch.linspace(0, 1, steps + 1, dtype=torch.float64), grid)
    (alpha, sigma), h = schedule.alpha_sigma(times), schedule.half_log_snr(times).diff()
    before = None
    for i in progress_bar(range(steps), "DPM-Solver++(2M)", progress):
        p = predicted_x0(denoise, schedule, x, times[i])
        first_order = i == 0 or i == steps - 1 < 14
        change = 0 if first_order else h[i] / (2 * h[i - 1]) * (p - before)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h[i]) * (p + change)
        before = p
    return x


SAMPLERS = {
    "euler_maruyama": euler,
    "euler_ode": partial(euler, level=0.0),
    "dpm_solver": dpm_solver,
    "dpm_solver++": partial(dpm_solver, data=True),
    "dpm_solver++2m": multistep,
    "ddpm": ancestral,
    "ddim": ddim,
}


class ImageNoise:
    """Normal noise for images that depends on (seed, image index) alone, not on batches, processes or the device.

    noise = ImageNoise(seed, indices); each call noise(x) returns fresh numbers like x (len(indices), C, H, W).
    """

    def __init__(self, seed, indices):
        self.generators = [np.random.default_rng([seed, int(i)]) for i in indices]

    def __call__(self, x):
        draws = [g.standard_normal(tuple(x.shape[1:]), dtype=np.float32) for g in self.generators]
        return torch.from_numpy(np.stack(draws)).to(x)


@torch.no_grad()
def generate(model, schedule, shape, indices, y=None, null=None, *, sampler="dpm_solver", steps=50, w=1.0,
             channels=None, clip=False, seed=0, noise=None, device="cpu", progress=False):
    """Sample the images with these indices: (len(indices), *shape) float32 on `device`.

    shape is (C, H, W); y, null, w and channels are guide's; clip limits the predicted x_0 to [-1, 1]; noise is a
    function that returns noise like its argument, ImageNoise(seed, indices) where not given.
    Raises ValueError on an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
    denoise = guide(model, schedule, y, null, w, channels)
    noise = noise or ImageNoise(seed, indices)
    denoise = clamp_x0(denoise, schedule) if clip else denoise
    x = noise(torch.empty(len(indices), *shape, device=device))
    return SAMPLERS[sampler](denoise, schedule, x, steps, randn=noise, progress=progress)
