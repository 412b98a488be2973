"""Diffusion: noise schedules, losses, classifier-free guidance and samplers.

Training mixes an image x_0 with normal noise eps, and a network learns to tell them apart; t runs from 0 (data) to 1:

    x_t = alpha(t) x_0 + sigma(t) eps
    loss = |network(x_t, t, y) - target|^2      target: eps, x_0, or the velocity u = -(alpha' x_0 + sigma' eps)

Sampling starts with noise at t = 1. The network's answer gives estimates of x_0 and eps, and a sampler uses them to go
to an earlier time s, until s = 0. The simplest one, DDIM, mixes them anew: x_s = alpha(s) x_0 + sigma(s) eps.

    schedule = SCHEDULES["vp"]()
    loss = schedule.loss(model, x0, y).mean()                               # the loss of one training step
    denoise = guide(model, schedule, y, null=10, w=1.5)                     # (x, t) -> Denoised(x0, noise, variance)
    images = SAMPLERS["dpm_solver"](denoise, schedule, x_T, steps=50)       # x_T: noise, (N, C, H, W)

Time is a float in [0, 1] everywhere; step n of N of a discrete schedule is t = n / N. `schedule.model_time(t)` is what
a network is fed instead. Times and coefficients are float64, images keep their type.

Sources: VP and its SDE: arXiv:2011.13456. DDPM: arXiv:2006.11239. Learned variance, respacing: arXiv:2102.09672. DDIM:
arXiv:2010.02502. SiT: arXiv:2401.08740. JiT: arXiv:2511.13720. Guidance: arXiv:2207.12598; in an interval:
arXiv:2404.07724; by a weaker network: arXiv:2406.02507. DPM-Solver: arXiv:2206.00927; DPM-Solver++: arXiv:2211.01095.
test_all.py compares losses and samplers with the released code of U-ViT, DiT, SiT and JiT: they agree within 2e-6.
"""
import math
from functools import partial
from typing import NamedTuple, Optional

import numpy as np
import torch
from tqdm import tqdm


class Denoised(NamedTuple):
    """What a network knows about x_t = alpha x_0 + sigma eps. Each tensor is like x_t."""
    x0: torch.Tensor                        # estimate of x_0
    noise: torch.Tensor                     # estimate of eps
    variance: Optional[torch.Tensor]        # in [-1, 1], between the bounds of Schedule.posterior; None: not learned


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: how the signal fades, what the network predicts, and the loss


class Schedule:
    """What all schedules share. Times t may be floats or tensors of any shape; answers are float64 tensors like t.

    predict      what the network answers: "noise" (eps), "data" (x_0) or "velocity" (u = -(alpha' x_0 + sigma' eps))
    compare      in which of the three the squared error is taken; where not given: in what is predicted
    times        None: training times are uniform in [0, 1]; (mean, std): t = sigmoid(mean + std z) with normal z
    noise_scale  multiplies the noise, on schedule "flow" alone
    Raises ValueError on other values. Each schedule adds alpha_sigma(t), slopes(t) -> (alpha', sigma'), diffusion(t),
    the g of `euler`, and `fed`: the network's time is fed[0] t + fed[1].
    """
    predicts = "noise"              # by default
    t_max, t_min = 1.0, 1e-4        # first and last time of the DPM-Solvers: at t = 0 the log-SNR is infinite
    hold = 0.0                      # see `held`
    heun_at_0 = False               # is the velocity known at t = 0?

    def __init__(self, predict=None, compare=None, times=None, noise_scale=1.0):
        self.predict = predict or self.predicts
        self.compare = compare or self.predict
        self.logit_normal, self.noise_scale = times, noise_scale
        if not {self.predict, self.compare} <= {"noise", "data", "velocity"}:
            raise ValueError(f"predict {predict!r}, compare {compare!r}: choose from noise, data, velocity")
        if noise_scale != 1 and type(self) is not Flow:
            raise ValueError(f'noise_scale = {noise_scale} needs schedule "flow"')

    def training_time(self, u):
        """Uniform numbers u in [0, 1) -> the times to train at, one for each."""
        if self.logit_normal is None:
            return u
        mean, std = self.logit_normal
        return torch.sigmoid(mean + std * torch.special.ndtri(u))

    def times(self, steps, of="ode"):
        """The steps + 1 descending times of Euler and Heun ("ode"), Euler-Maruyama ("sde"), DDPM and DDIM ("chain")."""
        return torch.cat([torch.linspace(1, 1e-3, steps, dtype=torch.float64), torch.zeros(1)])

    def model_time(self, t):
        return self.fed[0] * float64(t) + self.fed[1]

    def half_log_snr(self, t):
        """lambda(t) = log(alpha / sigma), the time in which DPM-Solver takes its steps. It falls with t."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha.log() - sigma.log()

    def time(self, half_log_snr):
        """The inverse of half_log_snr, tensors like it: halves [0, 1] until float64 ends."""
        t = torch.zeros_like(half_log_snr)
        for k in range(1, 60):
            t = t + 0.5**k * (self.half_log_snr(t + 0.5**k) > half_log_snr)
        return t

    def split(self, out, x):
        """A network's output -> (answer like x, learned variance like x or None). ValueError on other channels."""
        channels = x.shape[1]
        if out.shape[0] != x.shape[0] or out.shape[1] not in (channels, 2 * channels) or out.shape[2:] != x.shape[2:]:
            raise ValueError(f"the model turned {tuple(x.shape)} into {tuple(out.shape)}: "
                             f"expected {channels} or {2 * channels} channels")
        return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None

    def held(self, t):
        """The time at which an answer is converted: t, but at a distance from a division by 0 where `compare` differs
        from `predict` (JiT). It is at least `hold` for data (sigma is 0 at t = 0), at most 1 - `hold` for noise."""
        if self.predict == self.compare:
            return float64(t)
        return float64(t).clamp(self.hold * (self.predict == "data"), 1 - self.hold * (self.predict == "noise"))

    def turn(self, t):
        """alpha sigma' - sigma alpha': the determinant of (x_0, eps) -> (x_t, -u)."""
        (alpha, sigma), (alpha_slope, sigma_slope) = self.alpha_sigma(t), self.slopes(t)
        return alpha * sigma_slope - sigma * alpha_slope

    def denoised(self, out, x, t):
        """A network's output at x and t (one time, or (N,)) -> Denoised. Every conversion of an answer is here."""
        (answer, v), t = self.split(out, x), self.held(t)
        alpha, sigma = (per_image(a, x) for a in self.alpha_sigma(t))
        if self.predict == "noise":
            return Denoised((x - sigma * answer) / alpha, answer, v)
        if self.predict == "data":
            return Denoised(answer, (x - alpha * answer) / sigma, v)
        alpha_slope, sigma_slope, turn = (per_image(a, x) for a in (*self.slopes(t), self.turn(t)))
        x0 = sigma_slope / turn * x + sigma / turn * answer                 # finite at both ends on flow and gvp
        return Denoised(x0, -alpha_slope / turn * x - alpha / turn * answer, v)

    def velocity(self, x0, noise, t):
        """u = -(alpha' x_0 + sigma' eps), like x0: -dx/dt of the probability-flow ODE (SiT, equations 2, 3)."""
        alpha_slope, sigma_slope = (per_image(a, x0) for a in self.slopes(t))
        return -alpha_slope * x0 - sigma_slope * noise

    def weight(self, t):
        """(Error in `compare` / error in `predict`)^2: the losses of the three predictions differ by this alone, since
        at a given x_t an error is one of eps, of x_0 and of u at once, in sizes as alpha : sigma : turn."""
        t = self.held(t)
        size = dict(zip(("noise", "data", "velocity"), (*self.alpha_sigma(t), self.turn(t))))
        return (size[self.compare] / size[self.predict]) ** 2

    def loss(self, model, x0, y=None, t=None, noise=None):
        """Loss of each image, (N,): the mean squared error of the answer (predicted noise: DDPM, equation 14).

        model   (x_t, network time (N,), y) -> (N, C, H, W); or (N, 2C, H, W), whose second half is a learned variance,
                and then the variational bound that trains it is added (schedule "ddpm" only)
        x0      (N, C, H, W), scaled to [-1, 1] or to unit variance;  y: labels or text features, passed on to the model
        t       (N,) in [0, 1], drawn where not given;  noise: normal numbers like x0, drawn where not given
        """
        if t is None:
            t = self.training_time(torch.rand(len(x0), device=x0.device, dtype=torch.float64))
        if noise is None:
            noise = torch.randn_like(x0)
        alpha, sigma = (per_image(a, x0) for a in self.alpha_sigma(t))
        x_t = alpha * x0 + sigma * noise                                    # (N, C, H, W)
        out = model(x_t, self.model_time(t).to(x0.dtype), y).to(x0.dtype)   # the loss is not taken in bf16
        answer, v = self.split(out, x0)
        target = noise if self.predict == "noise" else x0 if self.predict == "data" else self.velocity(x0, noise, t)
        loss = (answer - target).square().flatten(1).mean(1)                # (N,)
        if self.compare != self.predict:
            loss = loss * self.weight(t).to(loss)
        if v is not None:
            loss = loss + self.variational_bound(x0, x_t, self.denoised(out.detach(), x_t, t).x0, t, v)
        return loss

    def variational_bound(self, x0, x_t, predicted_x0, t, v):
        # It compares neighbours of a chain of steps, and of the papers' networks only DDPM's learn a variance.
        raise ValueError(f"schedule {type(self).__name__} trains no variance: build the model with learn_sigma=False")

    def posterior(self, s, t):
        """q(x_s | x_t, x_0) for s < t is normal with mean c0 x_0 + ct x_t and variance `low` (beta~). `high` (beta) is
        the variance of x_t given x_s; a learned one lies between. Returns c0, ct, low, high (DDPM, equations 6, 7)."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        kept = alpha_t / alpha_s * sigma_s / sigma_t                        # of x_t's noise, the share that is in x_s
        new = 1 - kept**2
        return alpha_s * new, kept * sigma_s / sigma_t, sigma_s**2 * new, sigma_t**2 * new


class VP(Schedule):
    """alpha^2 + sigma^2 = 1, from beta(t) = -2 d log alpha / dt = 0.1 + 19.9 t: U-ViT on pixels."""
    fed = 999, 0

    def log_alpha(self, t):
        return -0.5 * (0.1 * float64(t) + 19.9 * float64(t) ** 2 / 2)

    def beta(self, t):
        return 0.1 + 19.9 * float64(t)

    def alpha_sigma(self, t):
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()        # 1 - alpha^2 would lose digits at t = 0

    def slopes(self, t):
        alpha, sigma = self.alpha_sigma(t)
        return -self.beta(t) / 2 * alpha, self.beta(t) / 2 * alpha**2 / sigma

    def diffusion(self, t):
        return self.beta(t) / 2     # reverses dx = -beta/2 x dt + sqrt(beta) dw exactly (arXiv:2011.13456, equation 6)


class Discrete(VP):
    """The same from N betas: alpha(n/N)^2 = product of 1 - beta_i for i = 1..n, and log alpha is linear in between."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps, self.t_min = len(self.betas), 1 / len(self.betas)
        # log alpha at t = 0, 1/N, .. 1, float64 (N + 1,), on the device where it was needed last
        self.table = torch.cat([torch.zeros(1), torch.log1p(-self.betas).cumsum(0) / 2])

    def segment(self, t):
        """log alpha where the interval of the table that holds t begins and ends, and how far into it t is (0 to 1)."""
        position = float64(t) * self.steps
        index = position.floor().clamp(0, self.steps - 1).long()
        table = self.table = self.table.to(index.device)
        return table[index], table[index + 1], position - index

    def log_alpha(self, t):
        return torch.lerp(*self.segment(t))

    def beta(self, t):
        start, end, _ = self.segment(t)
        return 2 * self.steps * (start - end)

    def training_time(self, u):
        return ((super().training_time(u) * self.steps).floor().clamp(max=self.steps - 1) + 1) / self.steps

    def times(self, steps, of="ode"):
        if of != "chain":
            return super().times(steps)
        if not 1 <= steps <= self.steps:
            raise ValueError(f"{steps} sampling steps: this schedule has 1 to {self.steps}")
        index = torch.linspace(self.steps - 1, 0, steps, dtype=torch.float64).round()
        return torch.cat([index + 1, torch.zeros(1)]) / self.steps


class SD(Discrete):
    """Stable Diffusion's 1000 betas, linear in their square roots: U-ViT on latents. The network sees n in 1..1000."""
    fed = 1000, 0
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2


class DDPM(Discrete):
    """1000 linear betas from 1e-4 to 0.02: DiT and U-DiT, with learned variance. The network sees n - 1 in 0..999."""
    fed = 1000, -1
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)

    def variational_bound(self, x0, x_t, predicted_x0, t, v):
        """The bound's term at t, (N,), in bits per number (Nichol & Dhariwal, section 3.1): it trains v, not eps.

        At n > 1 it is KL(q(x_{n-1} | x_n, x_0) | p(x_{n-1} | x_n)) of two normals, at n = 1 8-bit data's likelihood.
        """
        n = (t * self.steps).round()
        c0, ct, _, high = (per_image(a, x0) for a in self.posterior((n - 1) / self.steps, n / self.steps))
        # At n = 1 the posterior is a point: its variance is replaced by that of n = 2, as in the released code.
        later = n.clamp(min=2)
        low = per_image(self.posterior((later - 1) / self.steps, later / self.steps)[2], x0).log()
        log_variance = low + (v + 1) / 2 * (high.log() - low)
        distance = (c0 * (x0 - predicted_x0)).square()
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + distance * (-log_variance).exp())
        likelihood = -log_likelihood_8bit(x0, c0 * predicted_x0 + ct * x_t, 0.5 * log_variance)
        return torch.where(per_image(n, x0) == 1, likelihood, kl).flatten(1).mean(1) / math.log(2)


class Flow(Schedule):
    """SiT's straight path: alpha = 1 - t, sigma = noise_scale t. The network sees SiT's own time, 1 - t.

    JiT is predict="data", compare="velocity": its velocity is (x_0 - x_t) / max(t, 0.05), in the loss and in sampling.
    Where noise is predicted, training and sampling keep to t = 1 - 1e-3 .. 1e-3 as in SiT.
    """
    fed, predicts, t_max, t_min, hold = (-1, 1), "velocity", 1 - 1e-3, 1e-3, 0.05
    last_step = 0.04        # the SDE's last step goes from this time to 0 (SiT's "Mean")

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.start, self.end = (self.t_max, self.t_min) if self.predict == "noise" else (1.0, 0.0)
        self.heun_at_0 = self.predict == "velocity"

    def alpha_sigma(self, t):
        return 1 - float64(t), self.noise_scale * float64(t)

    def slopes(self, t):
        one = torch.ones_like(float64(t))
        return -one, self.noise_scale * one

    def diffusion(self, t):
        return self.alpha_sigma(t)[1]       # SiT's default; with any g >= 0 the images at t are distributed alike

    def training_time(self, u):
        return self.end + (self.start - self.end) * super().training_time(u)

    def times(self, steps, of="ode"):
        if of == "sde":
            return torch.cat([torch.linspace(self.start, self.last_step, steps, dtype=torch.float64), torch.zeros(1)])
        return torch.linspace(self.start, self.end, steps + 1, dtype=torch.float64)

    def split(self, out, x):
        return super().split(out, x)[0], None       # SiT's networks keep DiT's channels for a variance, and use none


class GVP(Flow):
    """SiT's variance-preserving path: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    def alpha_sigma(self, t):
        return torch.cos(math.pi / 2 * float64(t)), torch.sin(math.pi / 2 * float64(t))

    def slopes(self, t):
        alpha, sigma = self.alpha_sigma(t)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha


SCHEDULES = {"vp": VP, "sd": SD, "ddpm": DDPM, "flow": Flow, "gvp": GVP}


def float64(t):
    return torch.as_tensor(t, dtype=torch.float64)


def per_image(a, x):
    """Numbers (N,), one for each image, in x's type and ready to multiply x (N, C, H, W). A single number stays so."""
    return a.to(x).view(-1, *[1] * (x.ndim - 1)) if a.ndim else a


def log_likelihood_8bit(x, mean, log_std):
    """log P of 8-bit data x (k / 127.5 - 1) under a normal: its mass within half a grey level, open at both ends."""
    def cdf(z):     # the released code's approximation of the normal's, kept to agree with it
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_std).exp())
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


# ---------------------------------------------------------------------------------------------------------------------
# From a network to a denoiser (x, t) -> Denoised(x0, noise, variance)


def guide(model, schedule, y=None, null=None, w=1.0, channels=None, interval=(0.0, 1.0), weak=None):
    """A denoiser (x, one time t) -> Denoised from a network and its condition, with classifier-free guidance:

    answer = unconditional + w (conditional - unconditional); w = 1 is none and costs no second pass. U-ViT's s is
    w - 1. Both halves run as one batch. A learned variance is that of the conditional half.

    y         labels (N,), text features (N, T, F), or None for an unconditional model
    null      the null label (an int) or the empty text's features (T, F); needed where w is not 1
    channels  guide only so many of the first channels (3 of 4 in the releases of DiT and SiT), all where None
    interval  (low, high): guide where low < t < high; low = 0 lets t = 0 in, high = 1 lets t = 1 in
    weak      a weaker network, which answers in place of the unconditional half (autoguidance)
    Raises ValueError where w asks for guidance that y or null can not give.
    """
    if w != 1 and weak is None:
        if y is None or null is None:
            raise ValueError(f"guidance w = {w} needs a conditional model, and its null label or empty text's features")
        y_and_null = torch.cat([y, torch.as_tensor(null, device=y.device, dtype=y.dtype).expand_as(y)])
    low, high = interval

    def denoise(x, t):
        time = x.new_full((len(x),), float(schedule.model_time(t)))         # (N,)
        inside = (low < t or low == 0) and (t < high or high == 1)
        if w == 1 or not inside:
            return schedule.denoised(model(x, time, y).to(x), x, t)
        if weak is None:
            out = model(torch.cat([x, x]), torch.cat([time, time]), y_and_null).to(x)
            conditional, unconditional = out.chunk(2)                       # each (N, C or 2C, H, W)
        else:
            conditional, unconditional = model(x, time, y).to(x), weak(x, time, y).to(x)
        k = x.shape[1] if channels is None else channels
        guided = torch.lerp(unconditional[:, :k], conditional[:, :k], w)
        return schedule.denoised(torch.cat([guided, conditional[:, k:]], dim=1), x, t)

    return denoise


def clamp_x0(denoise, schedule):
    """The same denoiser with its estimate of x_0 limited to [-1, 1], for pixels and networks still young: from noise
    this estimate divides by alpha, so that near t = 1 small errors become large ones in overall colour."""
    def clamped(x, t):
        x0, noise, v = denoise(x, t)
        x0, (alpha, sigma) = x0.clamp(-1, 1), schedule.alpha_sigma(schedule.held(t))
        return Denoised(x0, (x - alpha * x0) / sigma if sigma > 0 else noise, v)     # at t = 0 x_0 says nothing of eps

    return clamped


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: (denoise, schedule, x, steps) -> images, from noise x at t = 1
#
# Each calls the denoiser `steps` times (Heun: twice as often) and goes from t to s at each step. `randn` draws fresh
# noise like its argument, for the samplers that add any; the others are deterministic.


def euler(denoise, schedule, x, steps, randn=torch.randn_like, sde=True):
    """Euler-Maruyama on the reverse SDE, or Euler on the probability-flow ODE (g = 0). With h = t - s and normal z:

    x_s = x + h (u + g score) + sqrt(2 g h) z,  score = -eps / sigma; z = 0 in the last step   (SiT, equations 2 and 4)
    """
    for t, s in schedule.times(steps, "sde" if sde else "ode").unfold(0, 2, 1):
        x0, noise, _ = denoise(x, t)
        x = x + (t - s) * schedule.velocity(x0, noise, t)
        if sde:
            g, (_, sigma) = schedule.diffusion(t), schedule.alpha_sigma(t)
            x = x - (t - s) * g / sigma * noise
            if s > 0:
                x = x + (2 * g * (t - s)).sqrt() * randn(x)
    return x


def heun(denoise, schedule, x, steps, randn=None):
    """Heun's method on the ODE, second order: two evaluations a step, the mean of their velocities.

    The last step is Euler's where the velocity is not known at t = 0.
    """
    def velocity(x, t):
        x0, noise, _ = denoise(x, t)
        return schedule.velocity(x0, noise, t)

    for t, s in schedule.times(steps).unfold(0, 2, 1):
        u = velocity(x, t)
        if s > 0 or schedule.heun_at_0:
            u = (u + velocity(x + (t - s) * u, s)) / 2
        x = x + (t - s) * u
    return x


def ancestral(denoise, schedule, x, steps, randn=torch.randn_like):
    """DDPM's sampler: draw x_s from p(x_s | x_t) down a respaced chain. The variance is learned, or else beta~."""
    for t, s in schedule.times(steps, "chain").unfold(0, 2, 1):
        c0, ct, low, high = schedule.posterior(s, t)
        x0, _, v = denoise(x, t)
        x = c0 * x0 + ct * x
        if s > 0:
            log_variance = low.log() if v is None else low.log() + (v + 1) / 2 * (high / low).log()
            x = x + (0.5 * log_variance).exp() * randn(x)
    return x


def ddim(denoise, schedule, x, steps, randn=None):
    """DDIM (equation 12, eta = 0): mix x_0 and eps anew for time s. On flow this is Euler's method."""
    for t, s in schedule.times(steps, "chain").unfold(0, 2, 1):
        (alpha, sigma), (x0, noise, _) = schedule.alpha_sigma(s), denoise(x, t)       # alpha and sigma of time s
        x = alpha * x0 + sigma * noise
    return x


def dpm_solver(denoise, schedule, x, steps, randn=None, data=False):
    """DPM-Solver, single-step, third order where it can ("fast"): `steps` evaluations in all, to t_min.

    It solves for the noise prediction, in updates of equal length in lambda, with inner points evenly between. `data`:
    for the data prediction (DPM-Solver++, steadier under guidance), with `steps` intervals of equal length in time, of
    which an update of order k spans k. Raises ValueError on less than 1 step.
    """
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: DPM-Solver needs at least 1")

    def predict(x, t):
        return denoise(x, t).x0 if data else denoise(x, t).noise

    # 3, 3, .. and what is left in one or two last updates, of low order: there is most curvature.
    orders = [3] * (steps // 3 - 1) + [2, 1] if steps % 3 == 0 else [3] * (steps // 3) + [steps % 3]
    nodes = [torch.arange(k + 1, dtype=torch.float64) for k in orders]      # start, inner points and end of an update
    ends = float64([schedule.t_max, schedule.t_min])
    if data:
        parts = [(sum(orders[:i]) + node) / steps for i, node in enumerate(nodes)]
        times = torch.lerp(*ends, torch.cat(parts))
    else:
        parts = [(i + node / node[-1]) / len(orders) for i, node in enumerate(nodes)]
        times = schedule.time(torch.lerp(*schedule.half_log_snr(ends), torch.cat(parts)))
    for update in times.split([k + 1 for k in orders]):
        x = dpm_step(predict, schedule, x, update, data)
    return x


def dpm_step(predict, schedule, x, times, data):
    """One step from times[0] to times[-1], of order len(times) - 1, with an evaluation at each but the last.

    In lambda the ODE is linear but for the prediction p. Solved exactly for a p of constant slope p', which inner
    points give, it is x_t = keep x + add p + bend p' (DPM-Solver, algorithms 1 and 2; DPM-Solver++, appendix A).
    """
    alpha, sigma = schedule.alpha_sigma(times)
    h = schedule.half_log_snr(times) - schedule.half_log_snr(times[0])
    if data:
        keep, add, bend = sigma / sigma[0], -alpha * torch.expm1(-h), alpha * (torch.expm1(-h) + h)
    else:
        keep, add, bend = alpha / alpha[0], -sigma * torch.expm1(h), -sigma * (torch.expm1(h) - h)
    p = predict(x, times[0])
    x1 = keep[1] * x + add[1] * p
    if len(times) == 2:
        return x1
    slope = (predict(x1, times[1]) - p) / h[1]
    if len(times) == 3:
        return keep[2] * x + add[2] * (p + h[2] / 2 * slope)
    x2 = keep[2] * x + add[2] * p + bend[2] * slope
    slope = (predict(x2, times[2]) - p) / h[2]
    return keep[3] * x + add[3] * p + bend[3] * slope


def multistep(denoise, schedule, x, steps, randn=None):
    """DPM-Solver++(2M): second order with one evaluation a step, since the slope comes from the step before. To t_min.

    x_t = sigma_t / sigma_s x - alpha_t (e^-h - 1) (p + h / (2 h') (p - p'))    p: x_0, h: width in lambda (algorithm 2)

    The first step has no step before it, and the last of fewer than 15 is safer without: they are of first order.
    """
    times = torch.lerp(*float64([schedule.t_max, schedule.t_min]), torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    (alpha, sigma), h = schedule.alpha_sigma(times), schedule.half_log_snr(times).diff()
    before = None
    for i in range(steps):
        p = denoise(x, times[i]).x0
        first_order = i == 0 or i == steps - 1 < 14
        change = 0 if first_order else h[i] / (2 * h[i - 1]) * (p - before)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h[i]) * (p + change)
        before = p
    return x


SAMPLERS = {"euler_maruyama": euler, "euler_ode": partial(euler, sde=False), "heun": heun,
            "dpm_solver": dpm_solver, "dpm_solver++": partial(dpm_solver, data=True), "dpm_solver++2m": multistep,
            "ddpm": ancestral, "ddim": ddim}


class ImageNoise:
    """Normal noise for images that depends on (seed, image index) alone, not on batches, processes or the device.

    noise = ImageNoise(seed, indices); each call noise(x) returns fresh numbers like x (len(indices), C, H, W).
    """

    def __init__(self, seed, indices):
        self.generators = [np.random.default_rng([seed, int(i)]) for i in indices]

    def __call__(self, x):
        draws = [g.standard_normal(tuple(x.shape[1:]), dtype=np.float32) for g in self.generators]
        noise = torch.from_numpy(np.stack(draws))       # pinned memory goes up while a GPU still runs the network
        return (noise.pin_memory() if x.is_cuda else noise).to(x, non_blocking=True)


@torch.no_grad()
def generate(model, schedule, shape, indices, y=None, null=None, *, sampler="dpm_solver", steps=50, clip=False,
             seed=0, noise=None, device="cpu", progress=False, **guidance):
    """Sample the images with these indices: (len(indices), *shape) float32 on `device`.

    shape is (C, H, W); y, null and **guidance (w, channels, interval, weak) are guide's; clip limits the estimates of
    x_0 to [-1, 1]; noise is a function that returns noise like its argument, ImageNoise(seed, indices) where not given;
    progress shows a bar, which counts evaluations. Raises ValueError on an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
    denoise = guide(model, schedule, y, null, **guidance)
    denoise = clamp_x0(denoise, schedule) if clip else denoise
    noise = noise or ImageNoise(seed, indices)
    x = schedule.noise_scale * noise(torch.empty(len(indices), *shape, device=device))
    with tqdm(desc=sampler, total=steps, unit="step", leave=False, disable=not progress) as bar:
        def counted(x, t):
            bar.update()
            return denoise(x, t)

        return SAMPLERS[sampler](counted, schedule, x, steps, randn=noise)
